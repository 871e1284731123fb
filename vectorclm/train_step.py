"""One optimizer step over a batch: its loss and gradients, for any number of micro-batches and ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vectorclm.dataset import Batch
from vectorclm.errors import DataError
from vectorclm.model import CausalLM
from vectorclm.nn.attention import Documents, has_flash
from vectorclm.nn.loss import IGNORE_INDEX
from vectorclm.runtime.group import ALONE, Group

LossFunction = Callable[[Tensor, Tensor, Documents | None], Tensor]  # input_ids, labels, documents


def loss_function(model: CausalLM, device: torch.device) -> LossFunction:
    """The model's loss, compiled on a GPU: as one graph, unless attention runs document by document.

    The environment variable TORCHDYNAMO_DISABLE=1 switches the compiler off.
    """
    if device.type != "cuda":
        return model.loss
    whole = has_flash(device) and not model.config.attention_dropout
    # A deterministic compiler chooses no kernel by its time, which differs between processes.
    fixed = torch.are_deterministic_algorithms_enabled()
    compiled: LossFunction = torch.compile(model.loss, fullgraph=whole, options={"deterministic": fixed})
    return compiled


def supervised_tokens(batch: Batch) -> int:
    """The number of tokens of a batch that carry loss."""
    return int((batch.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step over a batch, with gradient accumulation over micro-batches and a sum over ranks.

    The loss is the mean over the supervised tokens of the whole batch, for any number of ranks and micro-batches.
    No method waits for the device.
    """

    model: CausalLM
    optimizers: Sequence[torch.optim.Optimizer]
    gradient_clipping: float
    micro_batch: int  # windows in one forward and backward pass
    group: Group = ALONE
    loss_of: LossFunction | None = None  # the model's loss, compiled or not

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Train on a batch; return the mean loss (nats a supervised token) and the gradient's norm.

        Raises DataError where the batch has no supervised token.
        """
        return self.update(self.accumulate(batch, self.group.total(supervised_tokens(batch))))

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.model.model.embed_tokens.weight.device

    def accumulate(self, batch: Batch, supervised: int) -> Tensor:
        """Sum up a batch's gradients and its loss, each divided by the supervised tokens of all ranks.

        Raises DataError where `supervised` is 0.
        """
        self.model.train()
        if not supervised:
            raise DataError(
                "a batch has no supervised token: its labels are all -100, so there is nothing to learn from"
            )
        loss_of, device = self.loss_of or self.model.loss, self.device
        total = torch.zeros((), device=device)
        for start in range(0, len(batch.input_ids), self.micro_batch):
            here = slice(start, start + self.micro_batch)
            input_ids = batch.input_ids[here].to(device, non_blocking=True)
            labels = batch.labels[here].to(device, non_blocking=True)
            documents = Documents.at(None if batch.position_ids is None else batch.position_ids[here], device)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = loss_of(input_ids, labels, documents) / supervised
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            self.group.moved()
        return total

    def update(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Change the weights by the gradients of all ranks; return the loss over all ranks and the gradient's norm."""
        norm = self.reduce(total)
        self.apply()
        return total, norm

    def reduce(self, total: Tensor) -> Tensor:
        """Sum the loss `total` and the gradients over the ranks, and clip; return the gradient's norm before that."""
        if self.group.world_size > 1:
            self.group.add([total, *self._gradients()])
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clipping)

    def apply(self, accepted: bool = True) -> None:
        """Change the weights by the gradients; a step that is not `accepted` changes nothing."""
        for optimizer in self.optimizers:
            if accepted:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> Iterator[Tensor]:
        """Every parameter's gradient; zeros where this rank has no rows."""
        for p in self.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            yield p.grad
