"""Write a model as a Hugging Face folder in float32, through transformers: what other engines can read.

    python -m replicas.engine.export --model model.gguf --output FOLDER

No weights are written if FOLDER is there already. A chat_template.jinja beside the model goes along. transformers (with
`gguf`) reads the weights, not our own reader: a comparison with another engine then also compares our reading of the
file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

TEMPLATE = "chat_template.jinja"  # as transformers and vLLM look for it


def export(model: Path, output: Path) -> None:
    """Write `output` completely or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = model if model.is_file() else next(iter(sorted(model.glob("*.gguf"))), None)
    folder, name = (model, None) if found is None else (found.parent, found.name)
    source = {} if name is None else {"gguf_file": name}
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **source)
    if name is not None:  # transformers has dequantised the weights but would still refuse to save them
        weights.hf_quantizer = None
        del weights.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        part = Path(scratch) / "model"
        weights.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, output)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="model folder or .gguf file")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    args = parser.parse_args()
    if not args.model.exists():
        parser.error(f"--model {str(args.model)!r} does not exist")
    if not args.output.exists():
        export(args.model, args.output)
    template = (args.model if args.model.is_dir() else args.model.parent) / TEMPLATE
    if template.exists():
        shutil.copyfile(template, args.output / TEMPLATE)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
