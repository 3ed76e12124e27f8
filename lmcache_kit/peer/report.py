"""How a move ended: its state, and a message that explains it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from lmcache_kit.cache.descriptors import DeleteResult
from lmcache_kit.interfaces.operations import OperationStatus, Progress

if TYPE_CHECKING:
    from lmcache_kit.peer.move_source import MoveStats

Stopped = Literal["", "cancelled", "expired"]
_MAX_REASONS = 3


def final_status(
    tokens: int,
    progress: Progress,
    stats: MoveStats,
    *,
    why: str,
    stopped: Stopped,
    incompatible: Mapping[str, int],
    deleted: DeleteResult,
) -> OperationStatus:
    """Describe the end of a move.

    ``why`` says what ended it early, if anything did. ``incompatible`` chunks, counted by the
    reason, are not among those of ``progress``.
    """
    remarks = [why] if why else []
    remarks += _remarks(progress, stats, incompatible, deleted, complete=not (why or stopped))
    message = "; ".join(remarks)
    if stopped:
        return OperationStatus(stopped, tokens, progress, message)
    missing = progress.chunks - progress.chunks_done - stats.gone
    state: Literal["done", "partial", "failed"] = "done"
    if why or missing or incompatible:
        state = "partial" if progress.chunks_done else "failed"
    return OperationStatus(state, tokens, progress, message)


def _remarks(
    progress: Progress,
    stats: MoveStats,
    incompatible: Mapping[str, int],
    deleted: DeleteResult,
    *,
    complete: bool,
) -> Iterator[str]:
    chunks = progress.chunks
    for reason, count in incompatible.items():
        yield f"{count} chunks are of no use here: {reason}"
    if complete and not chunks and not incompatible:
        yield "nothing of this is stored there"
    if stats.full:
        yield (
            f"there is no room here for {chunks - len(stats.arrived) - stats.gone} of {chunks} "
            "chunks; the source keeps them, and what they follow"
        )
    if stats.present:
        yield f"{stats.present} of {chunks} chunks were here already"
    if stats.gone:
        yield f"{stats.gone} of {chunks} chunks had gone meanwhile"
    if stats.retry:
        yield (
            f"{len(stats.retry)} of {chunks} chunks did not arrive intact, or were being stored "
            "at that time"
        )
    for reason, count in Counter(dict(stats.failures)).most_common(_MAX_REASONS):
        yield f"{count} of {chunks} chunks did not arrive: {reason}"
    if kept := _kept_chunks(deleted):
        yield kept


def _kept_chunks(deleted: DeleteResult) -> str:
    """Say which chunks the source did not delete, and why; empty if it deleted all."""
    kept = [
        f"{deleted.pinned} that are pinned" if deleted.pinned else "",
        f"{deleted.followed} that others there follow" if deleted.followed else "",
        f"{deleted.in_use} that other moves need" if deleted.in_use else "",
    ]
    reasons = ", ".join(each for each in kept if each)
    return f"the source keeps chunks: {reasons}" if reasons else ""
