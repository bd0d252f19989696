"""What `pip install edgewarden` brings to a device: small, and without the host's libraries."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

LIMIT_BYTES = 250e6


def base_packages():
    """Names of the base distribution and everything it needs, without any extra."""
    found, open_names = set(), ["edgewarden"]
    while open_names:
        name = open_names.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(requirement.name)
    return found


def test_the_base_install_has_no_host_library():
    assert not base_packages() & {"torch", "onnx", "onnxscript", "matplotlib", "rich", "sqlalchemy", "jinja2"}


def test_the_base_install_is_at_most_250_mb():
    size = sum(
        file.locate().stat().st_size
        for name in base_packages()
        for file in metadata.files(name) or []
        if file.locate().is_file()
    )
    assert 50e6 < size <= LIMIT_BYTES
