"""How a move ended, in a state and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from lmcache_kit.cache.descriptors import DeleteResult
from lmcache_kit.interfaces.operations import OperationStatus, Progress

if TYPE_CHECKING:
    from lmcache_kit.peer.chunk_receiver import MoveStats

Stopped = Literal["", "cancelled", "expired"]
_MAX_REASONS = 3


def outcome(
    tokens: int,
    progress: Progress,
    tally: MoveStats | None,
    *,
    why: str,
    stopped: Stopped,
    unfit: Mapping[str, int],
    forgotten: DeleteResult,
) -> OperationStatus:
    """``why``: what ended it before it was through. ``unfit`` chunks are not in ``progress``."""
    said = [why] if why else []
    said += _remarks(progress, tally, unfit, forgotten)
    message = "; ".join(said)
    if stopped:
        return OperationStatus(stopped, tokens, progress, message)
    missing = progress.chunks - progress.chunks_done - (tally.gone if tally else 0)
    state: Literal["done", "partial", "failed"] = "done"
    if why or missing or unfit:
        state = "partial" if progress.chunks_done else "failed"
    return OperationStatus(state, tokens, progress, message)


def _remarks(
    progress: Progress, tally: MoveStats | None, unfit: Mapping[str, int], forgotten: DeleteResult
) -> Iterator[str]:
    chunks = progress.chunks
    for reason, count in unfit.items():
        yield f"{count} chunks are of no use here: {reason}"
    if tally is None:
        if not chunks and not unfit:
            yield "nothing of this is stored there"
        return
    if tally.full:
        yield (
            f"there is no room here for {chunks - len(tally.here) - tally.gone} of {chunks} "
            "chunks; the source keeps them, and what they follow"
        )
    if tally.present:
        yield f"{tally.present} of {chunks} chunks were here already"
    if tally.gone:
        yield f"{tally.gone} of {chunks} chunks had gone meanwhile"
    if tally.again:
        yield f"{len(tally.again)} of {chunks} chunks did not come intact, or were stored just then"
    for reason, count in Counter(tally.why_not).most_common(_MAX_REASONS):
        yield f"{count} of {chunks} chunks did not come: {reason}"
    if kept := kept_chunks(forgotten):
        yield kept


def kept_chunks(forgotten: DeleteResult) -> str:
    """What the source did not forget, and why; empty if it forgot all."""
    kept = [
        f"{forgotten.pinned} that are pinned" if forgotten.pinned else "",
        f"{forgotten.followed} that others there follow" if forgotten.followed else "",
        f"{forgotten.in_use} that other moves need" if forgotten.in_use else "",
    ]
    said = ", ".join(each for each in kept if each)
    return f"the source keeps chunks: {said}" if said else ""
