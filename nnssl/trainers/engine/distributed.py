"""The processes ("ranks") that share one training, and all that they exchange.

Every rank draws its own samples of the very same global batch, and the gradients are averaged after the backward pass.
torch's ``DistributedDataParallel`` is not used: it cannot leave the heads without a loss alone, knows one module and
one kind of backward pass, and methods have several of each.

Small facts travel through torch's key-value store (no device, no order of collectives, no waiting of those who only
tell); tensors travel through ``torch.distributed``: nccl for CUDA, gloo for everything on the CPU.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnssl.errors import UserError

# a step, an online validation or a checkpoint never takes so long; a rank that waits longer waits in vain
TIMEOUT = timedelta(minutes=30)
# the store takes no value above 8 MiB
_PIECE = 1 << 20
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


class Ranks:
    """This process among those of a training. Without arguments: a training of one process, nothing is exchanged.

    Args:
        rank: number of this process, 0 for the main one, which alone writes files and prints.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        store: torch's key-value store, which all processes reach.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, store: dist.Store | None = None
    ):
        if size > 1 and store is None:
            raise ValueError("several ranks need a store")
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self._store: Any = None if store is None else dist.PrefixStore("training", store)
        self._used_keys = 0
        self._asked: tuple[Any, torch.Tensor] | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------ batches

    def even_share(self, patches: int, kind: str) -> int:
        """Patches of this rank in a global batch of ``patches``; ``kind`` is labeled or unlabeled.

        Raises:
            UserError: if there is none, or if not every rank gets the same number (the mean over ranks would not be the
                mean over patches).
        """
        if patches < 1:
            raise UserError(f"{kind}_batch_size must be at least 1", found=patches)
        if patches % self.size:
            larger = -(-patches // self.size) * self.size
            fewer = max(n for n in range(1, self.size) if patches % n == 0)
            raise UserError(
                f"a batch of {patches} {kind} patches cannot be shared evenly by {self.size} processes",
                fix=f"--set {kind}_batch_size={larger}, or start {fewer} instead of {self.size} processes",
            )
        return patches // self.size

    def rows(self, share: int) -> range:
        """Positions of this rank's ``share`` patches in the global batch."""
        return range(self.rank * share, (self.rank + 1) * share)

    def own_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """Rows of this rank in a tensor that was made for the global batch."""
        rows = self.rows(len(batch) // self.size)
        return batch[rows.start : rows.stop]

    def all_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """The global batch, of which every rank gives its rows; `own_rows` is the way back. No gradient."""
        if self.size == 1:
            return batch.detach()
        # as bytes, since not every number format can be sent
        own = batch.detach().contiguous().view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.cat(parts).view(batch.dtype)

    def joined_rows(self, batch: torch.Tensor) -> torch.Tensor:
        """`all_rows` with a gradient to this rank's own rows, for a loss of the global batch that all ranks compute.

        The mean over ranks of the gradients of that loss is then its gradient in one process.
        """
        if self.size == 1:
            return batch
        rows, own, place = self.all_rows(batch), batch.detach(), self.rows(len(batch))
        # the value stays, the gradient is multiplied by the number of ranks over which it will be averaged
        own = own + self.size * (batch - own)
        return torch.cat([rows[: place.start], own, rows[place.stop :]])

    # ------------------------------------------------------------------ start and end

    def connect(self, device: torch.device) -> None:
        """Connects the ranks for the exchange of tensors of ``device``; nothing if they are."""
        if self.size == 1 or dist.is_initialized():
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore(self._new_key(), self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)

    def disconnect(self) -> None:
        """Waits for all ranks and ends the exchange of tensors; the store still works. Nothing if not connected."""
        if not dist.is_initialized():
            return
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None
        self.barrier()
        dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    # ------------------------------------------------------------------ tensors

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks; to be called after the backward pass.

        All ranks must have gradients for the same parameters; those without one on all ranks keep none.
        """
        if self.size > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            _exchange(gradients, lambda flat: dist.all_reduce(flat.div_(self.size)))

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks, without gradient."""
        if self.size == 1:
            return value.detach()
        result = value.detach() / self.size
        dist.all_reduce(result)
        return result

    def all_values(self, value: torch.Tensor) -> torch.Tensor:
        """The values of all ranks ``(ranks, ...)``, through which gradients flow back to each of them."""
        return value[None] if self.size == 1 else AllGatherGrad.apply(value)

    def copy_from_main(self, modules: Iterable[nn.Module]) -> None:
        """Gives all ranks the parameters and buffers of the main rank."""
        if self.size > 1:
            tensors = [t.detach() for module in modules for t in (*module.parameters(), *module.buffers())]
            _exchange(tensors, lambda flat: dist.broadcast(flat, 0))

    def gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, in order of rank."""
        if self.size == 1:
            return items
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for one in lists for item in one]

    def agree(self, wish: int) -> int:
        """The largest wish of any rank, the same on all ranks; several ranks learn it one call later.

        The numbers travel while the next step is computed, so that no rank waits, neither for another nor for its
        device. A wish that is being granted is not asked for again.
        """
        if self.size == 1:
            return wish
        granted = 0
        if self._asked is not None:
            work, answer = self._asked
            work.wait()
            granted = int(answer)
        asked = torch.tensor(wish if wish > granted else 0)
        self._asked = (dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True), asked)
        return granted

    # ------------------------------------------------------------------ facts

    def from_main(self, function: Callable[[], T], timeout: timedelta | None = TIMEOUT) -> T:
        """What ``function`` returns on the main rank, which alone runs it: plain values, as JSON knows them.

        Where it raises, the other ranks end without a word. They wait for it no longer than ``timeout``.
        """
        if self.size == 1:
            return function()
        key = self._new_key()
        if self.is_main:
            try:
                result = function()
            except BaseException:
                self._store.set(key, "null")
                raise
            self._store.set(key, json.dumps([result]))
            return result
        self._wait_for([key], timeout)
        answer = json.loads(self._store.get(key))
        if answer is None:
            raise SystemExit(2)
        return answer[0]

    def deal(self, items: Sequence[T], stopping: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """Deals items out: each goes to the rank that asks first, so that none waits while there is work.

        When ``stopping`` is true on any rank, no rank gets a further item.
        """
        key = self._new_key()
        given = 0
        while (taken := given + 1 if self.size == 1 else self._store.add(key, 1)) <= len(items):
            if stopping():
                if self.size > 1:
                    self._store.add(key, len(items))
                return
            given = taken
            yield items[taken - 1]

    def collect(self, part: T) -> list[T] | None:
        """The parts of all ranks, in order of rank, on the main one; None on the others, which need not wait.

        The main rank waits for all, however long they take. A part is made of plain values, as JSON knows them; the
        ranks need not be connected.
        """
        if self.size == 1:
            return [part]
        key = self._new_key()
        data = json.dumps(part).encode()
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
        for i, piece in enumerate(pieces):
            self._store.set(f"{key}/{self.rank}/{i}", piece)
        self._store.set(f"{key}/{self.rank}", str(len(pieces)))
        if not self.is_main:
            return None
        parts = []
        for rank in range(self.size):
            self._wait_for([f"{key}/{rank}"], None)
            count = int(self._store.get(f"{key}/{rank}"))
            parts.append(json.loads(b"".join(self._store.get(f"{key}/{rank}/{i}") for i in range(count))))
        return parts

    def first_to_fail(self, text: str) -> bool:
        """Reports that this rank has failed; True unless another one did before, of which this is a consequence."""
        try:
            first = self._store.add("failures", 1) == 1
            if first:
                self._store.set("failure", text)
        except RuntimeError:  # the process that keeps the store has gone
            return True
        return first

    def _new_key(self) -> str:
        """A key that all ranks make alike, since they call the same methods in the same order."""
        self._used_keys += 1
        return f"{self._used_keys}"

    def _wait_for(self, keys: list[str], timeout: timedelta | None) -> None:
        # in short sleeps, because signals are not heard in a call that waits
        deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
        while not self._store.check(keys):
            if deadline is not None and time.monotonic() > deadline:
                raise RuntimeError(f"rank {self.rank} has waited {timeout} for the main rank")
            time.sleep(0.02)


def failure_in(store: dist.Store) -> str | None:
    """What the rank that failed first has reported; None if none has."""
    reports = dist.PrefixStore("training", store)
    return reports.get("failure").decode() if reports.check(["failure"]) else None


_current = Ranks()


def current_ranks() -> Ranks:
    """The ranks that this process has joined; a training of one process if none."""
    return _current


@contextmanager
def joined(ranks: Ranks) -> Iterator[Ranks]:
    """Makes trainers built in this context share their training with ``ranks``.

    Standard output of all but the main rank is discarded. Where several ranks fail, the first raises its error; the
    others, which fail for the same or a consequent reason, end without a word.
    """
    global _current
    before, _current = _current, ranks
    try:
        with ExitStack() as stack:
            if not ranks.is_main:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                warnings.simplefilter("ignore")
                os.environ["nnUNet_wandb_enabled"] = "0"
            yield ranks
        ranks.disconnect()
    except SystemExit as ending:
        if not ending.code:  # a stop, which all ranks have agreed upon
            ranks.disconnect()
        raise
    except Exception as error:
        known = isinstance(error, UserError)
        if ranks.size > 1 and not ranks.first_to_fail(str(error) if known else traceback.format_exc()):
            raise SystemExit(2 if known else 1) from None
        raise
    finally:
        _current = before


def ranks_of_environment() -> Ranks:
    """The ranks that ``torchrun`` started, told by its environment variables; one process if there are none.

    Raises:
        UserError: if some of the variables are missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(
            "WORLD_SIZE asks for several processes, but the other variables of torchrun are missing",
            found=f"no {', '.join(missing)}",
            fix="start with torchrun, or with -num_gpus for one machine, or unset WORLD_SIZE",
        )
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    return Ranks(rank, size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), store)


def synchronize_batch_norms(module: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """``module`` with batch norms that see the patches of all ranks, as in nnU-Net's distributed training.

    Raises:
        UserError: on a CPU, for which torch has no such layer.
    """
    if ranks.size == 1 or not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return module
    if device.type != "cuda":
        raise UserError("batch norms cannot be shared by several processes on a CPU", fix="train with one process")
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def _exchange(tensors: Sequence[torch.Tensor], operation: Callable[[torch.Tensor], Any]) -> None:
    """Runs an operation in place on many tensors as on one (per number format), which saves a message for each."""
    formats: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        formats.setdefault(tensor.dtype, []).append(tensor)
    for group in formats.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        operation(flat)
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)])
