"""Identify LoRA adapters by their content, as a scheduler comes to see them.

vLLM's workers read an adapter once, and again for each request that says ``load_inplace``. Nothing
tells the scheduler when. Its files are therefore compared at each request: where they have changed
although vLLM does not read them again, nobody knows which content the workers use.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from blake3 import blake3

from lmcache_kit.vllm import weights
from lmcache_kit.vllm.identity import local_folder

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_log = logging.getLogger("vllm.lmcache_kit")

_CONFIG = "adapter_config.json"
_NOT_OF_KV = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")

_State: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""Path, inode, size and time of change of each file."""


class _Seen(NamedTuple):
    """An adapter as it was read."""

    path: str
    state: _State
    digest: str


class Adapters:
    """The adapters of one engine. Called from its scheduler's thread only."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._digests: dict[tuple[str, str], set[str]] = {}
        self._warned: set[int] = set()

    def digest(self, lora: LoRARequest) -> str | None:
        """Return the digest of an adapter's content, or None when it is not certain."""
        try:
            folder = local_folder(lora.lora_path, None, None)
            # vLLM may download an adapter that is not here for this very request.
            return None if folder is None else self._digest(lora, folder)
        except (OSError, ValueError) as error:
            self._warn(lora, str(error))
            return None

    def _digest(self, lora: LoRARequest, folder: Path) -> str | None:
        state = _state(folder)
        known = self._seen.get(lora.lora_int_id)
        if known is not None:
            if (known.path, known.state) == (lora.lora_path, state):
                return known.digest
            if not lora.load_inplace:
                raise ValueError("its files have changed since vLLM has read them")
        if not state:
            raise ValueError(f"no weights are found at {lora.lora_path!r}")
        digest = _content(folder, lora)
        if _state(folder) != state:
            return None  # they are being written; the next request finds what they become
        self._seen[lora.lora_int_id] = _Seen(lora.lora_path, state, digest)
        self._digests.setdefault((lora.lora_name, lora.lora_path), set()).add(digest)
        return digest

    def is_current(self, lora: LoRARequest, digest: str) -> bool:
        """Whether the adapter's files are those of this digest, as they were read."""
        known = self._seen.get(lora.lora_int_id)
        if known is None or known.digest != digest:
            return False
        try:
            folder = local_folder(known.path, None, None)
            return folder is not None and _state(folder) == known.state
        except OSError:
            return False

    def has_changed(self, lora: LoRARequest) -> bool:
        """Whether name and path have meant several contents.

        vLLM's own prefix cache does not tell them apart.
        """
        return len(self._digests.get((lora.lora_name, lora.lora_path), ())) > 1

    def _warn(self, lora: LoRARequest, why: str) -> None:
        if lora.lora_int_id not in self._warned:
            self._warned.add(lora.lora_int_id)
            _log.warning(
                "requests for LoRA adapter %r are served without a cache: %s. Load changed weights "
                "under a new name or path, or with load_inplace",
                lora.lora_name,
                why,
            )


def _state(folder: Path) -> _State:
    """Return what changes when the adapter's files do; empty without weights."""
    files = weights.weight_files(folder)
    if not files:
        return ()
    config = files[0].parent / _CONFIG
    found = [(path, path.stat()) for path in (*files, config) if path.exists()]
    return tuple((path.name, each.st_ino, each.st_size, each.st_mtime_ns) for path, each in found)


def _content(folder: Path, lora: LoRARequest) -> str:
    """Read all weights, which are few, and the settings that scale and place them."""
    config: dict[str, object] = {"is_3d": bool(getattr(lora, "is_3d_lora_weight", False))}
    described = folder / _CONFIG
    if described.exists():
        config |= json.loads(described.read_bytes())
    facts = {name: value for name, value in config.items() if name not in _NOT_OF_KV}
    content = weights.digest(weights.weight_files(folder), full=True)
    return blake3(json.dumps([content, facts], sort_keys=True).encode()).hexdigest(16)
