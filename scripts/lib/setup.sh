# Set-up shared by every script: a virtual environment with pinned packages, and Debian's mosquitto.
# Usage: . scripts/lib/setup.sh; ew_setup          (quick when nothing changed; safe to run twice or at once)
# Settings: EDGEWARDEN_PYTHON  the Python to use (3.11 or newer)
#           EDGEWARDEN_VENV    where the virtual environment goes (default: .venv in the repository)

EW_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
EW_VENV=${EDGEWARDEN_VENV:-$EW_ROOT/.venv}
EW_CALLER_PWD=$PWD
EW_DIM="" EW_RED="" EW_PLAIN="" # colours only for a terminal
if [ -t 2 ]; then EW_DIM=$'\033[2m' EW_RED=$'\033[31m' EW_PLAIN=$'\033[0m'; fi
EW_NEED_MB=2600 # virtual environment with torch (CPU), measured 1,500 MB, and pip's temporary files

ew_say() { printf '%s[set-up]%s %s\n' "$EW_DIM" "$EW_PLAIN" "$*" >&2; }
ew_die() {
  printf '%sset-up failed:%s %s\n' "$EW_RED" "$EW_PLAIN" "$*" >&2
  exit 2
}

# Prints a Python >= 3.11 on 64 bits, or stops with what to do.
ew_python() {
  local candidate
  for candidate in ${EDGEWARDEN_PYTHON:-} python3 python3.11 python3.12 python3.13; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (sys.version_info >= (3, 11) and sys.maxsize > 2**32))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  ew_die "no 64-bit Python 3.11 or newer found. Install it (Debian 12: apt-get install python3 python3-venv) or set EDGEWARDEN_PYTHON."
}

# Runs apt-get as root, directly or through sudo without a password; returns 1 where that is not permitted.
ew_apt_install() {
  local as_root=""
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
    as_root="sudo -n"
  fi
  command -v apt-get >/dev/null || return 1
  local list
  list=$(mktemp)
  if ! { $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q &&
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"; } >"$list" 2>&1; then
    tail -n 5 "$list" >&2
    rm -f "$list"
    return 1
  fi
  rm -f "$list"
}

ew_setup_venv() {
  local python=$1 stamp want log
  stamp=$EW_VENV/.edgewarden-stamp
  want=$(cat "$EW_ROOT/constraints.txt" "$EW_ROOT/pyproject.toml" "$EW_ROOT/scripts/lib/setup.sh" | sha256sum | cut -c1-64)
  want="$want $EW_ROOT $("$python" -c 'import sys; print(sys.version)' | head -n 1)"
  if [ -x "$EW_VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi

  local free_mb
  free_mb=$(df -Pm "$(dirname "$EW_VENV")" | awk 'NR==2 {print $4}')
  if [ ! -d "$EW_VENV" ] && [ "$free_mb" -lt "$EW_NEED_MB" ]; then
    ew_die "$(dirname "$EW_VENV") has $free_mb MB free, $EW_NEED_MB MB are needed. Free some space or set EDGEWARDEN_VENV to a folder on another disk."
  fi
  ew_say "virtual environment in $EW_VENV with the packages pinned in constraints.txt (about 1.5 GB, torch is half of it)"
  if [ ! -x "$EW_VENV/bin/python" ] && ! "$python" -m venv "$EW_VENV" >/dev/null 2>&1; then
    ew_say "Python's venv module is missing; installing Debian's python3-venv"
    rm -rf "$EW_VENV"
    ew_apt_install python3-venv && "$python" -m venv "$EW_VENV" >/dev/null ||
      ew_die "cannot make a virtual environment with $python. Install its venv module (Debian: apt-get install python3-venv) and run this again."
  fi
  log=$EW_VENV/.edgewarden-install.log
  ew_pip "$log" "setuptools" "setuptools"
  ew_pip "$log" "torch, CPU" "torch==2.13.0"
  ew_pip "$log" "edgewarden with its compressor and development tools" --no-build-isolation -e "$EW_ROOT[compressor,dev]"
  ew_pip "$log" "the demo's data (seglearn, 11 MB)" --no-deps "seglearn"
  printf '%s\n' "$want" >"$stamp"
  ew_say "done: $(du -sm "$EW_VENV" | cut -f1) MB"
}

ew_pip() {
  local log=$1 what=$2
  shift 2
  ew_say "installing $what"
  ew_tell_growth &
  local teller=$! ok=yes
  "$EW_VENV/bin/python" -m pip install --disable-pip-version-check --no-input -q -c "$EW_ROOT/constraints.txt" "$@" >"$log" 2>&1 || ok=no
  { kill "$teller" && wait "$teller"; } 2>/dev/null || true
  if [ "$ok" = no ]; then
    grep -v WARNING "$log" | tail -n 8 >&2
    ew_die "pip could not install $what. Check the network and the package index, then run this again; the whole output is in $log"
  fi
}

# While pip is silent: every few seconds, how large the virtual environment is by now. Ends with the script.
ew_tell_growth() {
  exec 9>&- >/dev/null # neither the lock nor a pipe of the script's is held by what may end a second later
  local ticks=0
  while sleep 1 2>/dev/null && kill -0 $$ 2>/dev/null; do
    ticks=$((ticks + 1))
    if [ $((ticks % 5)) = 0 ]; then ew_say "  $ticks s, $(du -sm "$EW_VENV" 2>/dev/null | cut -f1) MB so far"; fi
  done
}

# Debian's mosquitto, for brokers of our own on loopback. Never leaves the package's system service running.
ew_setup_mosquitto() {
  if command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ]; then return; fi
  ew_say "installing Debian's mosquitto (2 MB); its system service stays off, our scripts start private brokers"
  local policy=/usr/sbin/policy-rc.d made=no
  if [ "$(id -u)" = 0 ] && [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" && made=yes
  fi
  local ok=yes
  ew_apt_install mosquitto || ok=no
  if [ "$made" = yes ]; then rm -f "$policy"; fi
  if [ "$ok" = no ]; then
    ew_die "mosquitto is missing and cannot be installed from here. As root: apt-get install mosquitto (then: systemctl disable --now mosquitto), and run this again."
  fi
  if [ -d /run/systemd/system ]; then
    $([ "$(id -u)" = 0 ] || echo sudo -n) systemctl disable --now mosquitto >/dev/null 2>&1 || true
  fi
}

ew_setup() {
  local python started
  started=$(date +%s)
  python=$(ew_python) || exit 2
  mkdir -p "$(dirname "$EW_VENV")"
  exec 9>"$(dirname "$EW_VENV")/.$(basename "$EW_VENV").lock"
  if ! flock -n 9; then
    ew_say "another set-up is running; waiting for it"
    flock 9
  fi
  ew_setup_venv "$python"
  ew_setup_mosquitto
  exec 9>&-
  EW_SETUP_SECONDS=$(($(date +%s) - started))
  export EW_ROOT EW_VENV EW_CALLER_PWD EW_SETUP_SECONDS
  export ORT_DISABLE_TELEMETRY=1 # onnxruntime reports to its maker otherwise
  PATH="$EW_VENV/bin:$PATH:/usr/sbin"
  export PATH
  cd "$EW_ROOT" || exit 2
}
