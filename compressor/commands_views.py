"""`edgewarden-compressor views`: what the monitor is to see of a model that came as an ONNX file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from agent.contract.errors import Corrupt

HELP = """\
views:
  identity   the numbers of an input, at most 128 (over 64: projected to 64)
  channels   mean, log sd, log roughness and log spike of each channel of a window (rows, samples, channels)
  image      brightness, contrast, edges, sharpness, dark and bright share... of (rows, height, width, channels)
  hidden     a tensor inside the model, such as its last layer but one (over 64 numbers: projected to 64)
"""


def register(verbs: Any) -> None:
    """Add the commands to the parser."""
    views = verbs.add_parser("views", help="add what the monitor sees to an ONNX file")
    actions = views.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser(
        "add", help="one view more; the outputs stay the same to the last bit", epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add.add_argument("model", type=Path, help="an ONNX file, opset 13 or newer, weights inside")
    add.add_argument("--view", required=True, choices=("identity", "channels", "image", "hidden"))
    add.add_argument("--input", default="", metavar="NAME", help="the input it is of (default: the only one)")
    add.add_argument("--tensor", default="", metavar="NAME", help="for hidden: the tensor inside the model")
    add.add_argument(
        "--names", default="", metavar="A,B,...", help="names of the numbers (identity) or channels (channels)"
    )
    add.add_argument("--layout", default="NHWC", choices=("NHWC", "NCHW"), help="of an image (default %(default)s)")
    add.add_argument(
        "--range", type=float, nargs=2, default=(0.0, 255.0), metavar=("LOW", "HIGH"), dest="pixels",
        help="of an image's pixels (default 0 255)",
    )  # fmt: skip
    add.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the watched model goes")
    add.add_argument("--json", action="store_true", help="print the manifest's entry only")
    add.set_defaults(run=_add)


def _add(options: argparse.Namespace) -> int:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from compressor.files import write_file
    from compressor.surgery import Wanted, add_view

    try:
        model = onnx.load(options.model, load_external_data=False)
    except OSError as error:
        raise Corrupt(f"cannot read {options.model}: {error.strerror}", hint="Name an ONNX file.") from None
    except DecodeError:
        raise Corrupt(f"{options.model} is no ONNX file", hint="Name an ONNX file.") from None
    names = tuple(name.strip() for name in options.names.split(",")) if options.names else ()
    source = options.tensor if options.view == "hidden" else options.input
    low, high = options.pixels
    added = add_view(model, Wanted(options.view, source, names, low, high, options.layout))
    write_file(options.out, added.model.SerializeToString(deterministic=True))
    entry = json.dumps(added.view.model_dump(mode="json"), indent=1)
    told = (
        f"{options.out}: view '{added.view.name}', {len(added.view.features)} numbers; outputs the same to the bit\n"
    )
    if not options.json:
        sys.stdout.write(f"{told}entry of the manifest's `views`:\n")
    sys.stdout.write(f"{entry}\n")
    return 0
