"""Makes an update that must be refused: a sound model whose golden answers are not its own.

Every digest is right and the manifest is valid, so it is signed, fetched and verified like any other; only the
self-test, which asks the model itself, finds out. Nothing in the product knows of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agent.contract.artifact import FILES, MANIFEST, Blob, open_artifact, sha256
from agent.contract.errors import EdgewardenError
from compressor.files import dump_arrays, load_arrays
from compressor.package import write_artifact


def build_broken(source: Path, folder: Path, version: int) -> Path:
    """Write the artifact in `source` anew as `folder`/<its name>, with `version` and foreign golden answers.

    Raises:
        Corrupt, Incompatible: `source` is no artifact with golden inputs.
        StorageError: it cannot be written.
    """
    artifact = open_artifact(source)
    files = {role: artifact.path(role).read_bytes() for role in artifact.manifest.blobs if role in FILES}
    files["golden"] = _foreign(artifact.path("golden").read_bytes())
    blobs = {role: Blob(file=FILES[role], size=len(data), sha256=sha256(data)) for role, data in files.items()}
    manifest = artifact.manifest.model_copy(update={"version": version, "parent": artifact.digest, "blobs": blobs})
    place = folder / artifact.manifest.name
    write_artifact(place, {MANIFEST: manifest.encode(), **{FILES[role]: data for role, data in files.items()}})
    return place


def _foreign(golden: bytes) -> bytes:
    """The same inputs; every expected row is what another class would have got."""
    arrays = load_arrays(golden, where="golden inputs")
    answers = {name: np.roll(array, 1, axis=-1) for name, array in arrays.items() if name.startswith("out_")}
    return dump_arrays({**arrays, **answers})


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m compressor.examples.broken SOURCE FOLDER --version N`; returns an exit code."""
    parser = argparse.ArgumentParser(prog="broken", description="Build an update whose self-test fails.")
    parser.add_argument("source", type=Path, help="an artifact folder")
    parser.add_argument("folder", type=Path, help="where the broken one is written")
    parser.add_argument("--version", type=int, required=True)
    options = parser.parse_args(arguments)
    try:
        sys.stderr.write(f"{build_broken(options.source, options.folder, options.version)}\n")
    except EdgewardenError as error:
        sys.stderr.write(f"broken: {error.sentence()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
