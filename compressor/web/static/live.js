// Keeps the page fresh. Without it the page is complete and shows the moment it was loaded.
"use strict";
const source = document.body.dataset.live;
if (source && "EventSource" in window) {
  const feed = new EventSource(source);
  const state = document.getElementById("live-state");
  feed.onopen = () => { state.textContent = "live"; state.className = "chip good"; };
  feed.onerror = () => { state.textContent = "not connected"; state.className = "chip quiet"; };
  for (const part of document.querySelectorAll("[data-part]")) {
    feed.addEventListener(part.dataset.part, (event) => {
      // a form somebody is typing into, or numbers somebody unfolded, stay as they are
      if (part.contains(document.activeElement) && document.activeElement.matches("input")) return;
      const open = new Set([...part.querySelectorAll("details[open]")].map((item) => item.id));
      part.innerHTML = event.data; // rendered and escaped by our own server
      for (const item of part.querySelectorAll("details")) item.open = item.id && open.has(item.id);
    });
  }
}
