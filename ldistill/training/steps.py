"""What a step reads on this rank, and what all ranks agree on before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldistill.common import ranks
from ldistill.common.errors import TransientError, ignore_dead_workers, may_pass, worker_died
from ldistill.distill.distiller import Distiller
from ldistill.training.stopping import StopRequest


class Steps:
    """Reads micro-batches, plans them, counts their rows over all ranks; finds what goes wrong.

    Args:
        distiller: plans them and takes them.
        stop: a request to stop, which the ranks agree on.
        device: of this rank.
    """

    def __init__(self, distiller: Distiller, stop: StopRequest, device: torch.device) -> None:
        self.distiller, self.stop, self.device = distiller, stop, device
        # [1 + sources]: whether everything was finite so far, the loss before what each source has.
        self._finite = torch.ones(1 + len(distiller.weights.names), device=device)

    def read(
        self, batches: Iterator, count: int, done: int, problem: Exception | None = None
    ) -> list[dict[str, Any]]:
        """So many micro-batches, each as what :meth:`Distiller.forward` takes.

        One reduction a step: rows of the batch, who teaches, is all finite, readable, to stop?
        What one rank alone could not read stops all of them here, instead of leaving the others in
        a collective.

        Args:
            batches: of this rank (see `collate`).
            count: micro-batches of a step.
            done: steps so far.
            problem: what has failed on this rank already.

        Raises:
            FloatingPointError, ValueError, TransientError: on every rank, what one of them met.
        """
        read, failed = _read(batches, count)
        problem = problem or failed
        plans = [self.distiller.supervise(batch) for batch in read]
        own = [len(plan.queries) for plan in plans] or [0] * count
        flags = [float(self.stop.asked), float(problem is not None)]
        counts = [*flags, sum(len(plan.targets) for plan in plans), *own]
        vector = torch.tensor(counts, dtype=torch.float64, device=self.device)
        vector = torch.cat([vector, 1 - self._finite[:1].double()])
        stop, unread, total, *teachers, broken = ranks.sum_over(vector).tolist()
        self.stop.agreed |= stop > 0
        if broken:
            self.check_finite(done)
        if unread:
            _stop_unreadable(problem, done)
        teacher = self.distiller.teacher
        taught = teachers if teacher is not None and teacher.collective else own
        return [
            {"batch": batch, "supervision": plan, "total": max(total, 1.0), "run_teacher": n > 0}
            for batch, plan, n in zip(read, plans, taught, strict=True)
        ]

    def note_finite(self, outputs: Mapping[str, Tensor]) -> None:
        """Remember whether what the distiller gave is finite; no synchronisation."""
        finite = [outputs["loss"].detach()[None], outputs["metrics"].sum(1)]
        self._finite *= torch.isfinite(torch.cat(finite)).float()

    def check_finite(self, done: int) -> None:
        """Every rank must call it.

        Raises:
            FloatingPointError: on every rank, when the loss of one was not finite in that step.
        """
        loss, *sources = self._finite.tolist()
        names = [n for n, fine in zip(self.distiller.weights.names, sources) if not fine]

        def told(found: dict[int, list[str]]) -> FloatingPointError:
            return FloatingPointError(
                f"the loss of step {done} is not finite (sources: "
                f"{', '.join(sorted(set().union(*found.values())))}). Nothing was saved since; the "
                "last checkpoint is good. Lower the learning rate, or go on from it with "
                "--log_samples true and look at what that step read."
            )

        ranks.relay(None if loss else names or ["unknown"], told)


def _read(iterator: Iterator, count: int) -> tuple[list[Any], Exception | None]:
    """A step's micro-batches, or why there are none: an error whose text is a sentence."""
    try:
        return [next(iterator) for _ in range(count)], None
    except (ConnectionError, EOFError, RuntimeError) as error:  # of a worker, or of its queue
        ignore_dead_workers()
        lost = TransientError(f"a data worker failed ({type(error).__name__}: {error})")
        lost.__cause__ = error  # LDISTILL_DEBUG shows where
        return [], worker_died(error) or lost
    except (ValueError, OSError) as error:
        return [], error


def _stop_unreadable(problem: Exception | None, done: int) -> None:
    """Raise, on every rank, what one of them could not read; rather what must be mended."""

    def told(found: dict[int, tuple[str, bool]]) -> Exception:
        rank, (text, passing) = min(found.items(), key=lambda one: one[1][1])
        what = f"{text} (step {done + 1}, rank {rank}). Nothing was trained on it"
        again = "go on with --resume_from_checkpoint auto"
        error: Exception = ValueError(
            f"{what}: mend the shards (`ldistill shards verify` names all that is damaged) and "
            f"{again}, or let bad samples be dropped and counted with --on_bad_sample drop."
        )
        if passing:
            error = TransientError(f"{what}: {again}.")
        error.__cause__ = problem
        return error

    ranks.relay(None if problem is None else (str(problem), may_pass(problem)), told)
