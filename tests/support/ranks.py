"""What test processes run as the ranks of one training."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from nnssl.errors import UserError
from nnssl.trainers.engine.distributed import Ranks, current_ranks
from nnssl.trainers.engine.stopping import StopRequest


def fail_on_rank_1(kind: str) -> None:
    """Rank 1 fails; the others wait for it, and fail or are killed when it has gone."""
    ranks = current_ranks()
    print(f"rank {ranks.rank} is here")
    ranks.connect(torch.device("cpu"))
    if ranks.rank == 1:
        if kind == "a mistake":
            raise UserError("case_7 cannot be read", fix="look at case_7")
        raise ValueError("seven is not a number")
    ranks.barrier()


def stop_when_told(folder: Path) -> None:
    """Goes on until the launcher is sent SIGTERM, then stops as a training does; leaves the number of its steps."""
    ranks = current_ranks()
    ranks.connect(torch.device("cpu"))
    with StopRequest(None) as stop:
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)
        steps = 0
        while not ranks.agree(2 if stop else 0):
            steps += 1
            time.sleep(0.01)
    (folder / f"steps_{ranks.rank}").write_text(f"{steps} {stop.reason}")
    raise SystemExit(0)


def exchange(folder: Path) -> None:
    """Everything that `Ranks` exchanges, written to ``rank_<i>.pth``."""
    ranks = current_ranks()
    ranks.connect(torch.device("cpu"))
    torch.save(_exchanged(ranks), folder / f"rank_{ranks.rank}.pth")
    ranks.disconnect()
    if ranks.rank == 1:
        time.sleep(0.5)
        (folder / "late").touch()
    # larger than the store takes at once
    parts = ranks.collect(str(ranks.rank) * 9_000_000)
    if ranks.is_main:
        assert (folder / "late").exists(), "the main rank must wait for all"
        assert [(part[0], len(part)) for part in parts or []] == [("0", 9_000_000), ("1", 9_000_000)]
    else:
        assert parts is None


def _exchanged(ranks: Ranks) -> dict[str, Any]:
    rank = ranks.rank
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv3d(1, 1, 2), torch.nn.Linear(1, 1))
    layers.to(memory_format=torch.channels_last_3d)
    parameters = list(layers.parameters())
    for i, p in enumerate(parameters[:-1]):  # the last bias has none
        p.grad = torch.full_like(p, float(i + 10 * rank))
    ranks.average_gradients(parameters)
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(rank + 5.0)
    norm.num_batches_tracked.fill_(rank + 7)
    ranks.copy_from_main([norm])
    wishes = [ranks.agree(wish) for wish in ([0, 1, 0, 0, 0] if rank == 0 else [0, 2, 2, 0, 0])]
    dealt = []
    for case in ranks.deal(["a", "b", "c", "d", "e"]):
        dealt.append(case)
        time.sleep(0.3 if rank == 0 else 0.01)
    return {
        "gradients": [None if p.grad is None else p.grad.flatten().tolist() for p in parameters],
        "copied": [norm.running_mean[0].item(), norm.num_batches_tracked.item()],
        "wishes": wishes,
        "dealt": dealt,
        "mean": ranks.mean(torch.tensor([1.0, 3.0 * rank])).tolist(),
        "gathered": ranks.gather([f"from {rank}"]),
        "from main": ranks.from_main(lambda: {"process": os.getpid(), "rank": rank}),
        "rows": ranks.own_rows(torch.arange(6)).tolist(),
        "all rows": [
            ranks.all_rows(torch.arange(8).view(4, 2)[::2].add(10 * rank).to(dtype)).tolist()
            for dtype in (torch.float32, torch.int16, torch.bool)
        ],
    }
