"""XGrad: optimizers whose gradients are computed at the weights that they expect next."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class _Ahead(torch.optim.Optimizer, ABC):
    """Adds the expected update to the parameters after a step, and takes it away before the next one.

    What is added is kept, not the weights: writing other values into a parameter between steps has its usual effect.
    """

    def _begin(self, ahead: float) -> None:
        if not ahead >= 0:
            raise ValueError(f"ahead is {ahead}; the number of steps to look ahead is 0 or more")
        for group in (self.defaults, *self.param_groups):
            group.update(ahead=ahead, train_mode=True)

    @abstractmethod
    def _direction(self, group: dict[str, Any], state: dict[str, Any]) -> Tensor | None:
        """The expected update of a parameter, for a learning rate of -1; None before the first step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step from the weights themselves, with the gradients that are there; then go ahead."""
        self._move(back=True)
        loss = super().step(closure)
        self._move(back=False)
        return loss

    @torch.no_grad()
    def train(self) -> None:
        """Let the parameters be the expected weights."""
        self._switch(True)

    @torch.no_grad()
    def eval(self) -> None:
        """Let the parameters be the weights themselves."""
        self._switch(False)

    def _switch(self, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != training:
                group["train_mode"] = training
                for p in group["params"]:
                    if "ahead" in self.state.get(p, {}):
                        p.add_(self.state[p]["ahead"], alpha=1 if training else -1)

    def _move(self, back: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if back:
                    if group["train_mode"] and "ahead" in state:
                        p.sub_(state["ahead"])
                elif p.grad is not None and (direction := self._direction(group, state)) is not None:
                    before = p.clone()
                    p.sub_(group["ahead"] * group["lr"] * direction)
                    # As it was rounded, so that taking it away gives the same weights.
                    state["ahead"] = p - before
                    if not group["train_mode"]:
                        p.copy_(before)


class XGradAdamW(_Ahead, torch.optim.AdamW):
    r"""AdamW with XGrad's weight prediction: forward and backward passes are at the expected weights.

    After each step t, $w' = w - s\, \eta\, \hat m / (\sqrt{\hat v} + \epsilon)$ with the moments of this step; the next
    step subtracts from w, with the gradient at $w'$. The parameters are $w'$ in training and w in evaluation, as with
    schedule-free optimizers: a learner's predictions and `layerwise export` use w. A copy of the update is kept, 4
    bytes per number in float32. The first step is AdamW's.

    Args:
        params: as of AdamW.
        lr: $\eta$.
        betas: of both moments.
        eps: $\epsilon$.
        weight_decay: decoupled, as in AdamW; not part of the prediction.
        ahead: s, how many steps to look ahead.
        fused: as of AdamW.

    Source: Guan et al. 2023, "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction". That the prediction is
    made at the end of a step, for the next one, is our arrangement of the same computation.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = XGradAdamW([weight], lr=0.25, weight_decay=0.0)
    >>> weight.grad = torch.ones(1)
    >>> optimizer.step()
    >>> ahead = round(weight.item(), 3)
    >>> optimizer.eval()
    >>> ahead, round(weight.item(), 3)
    (0.5, 0.75)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ahead: float = 1.0,
        fused: bool | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)
        self._begin(ahead)

    def _direction(self, group: dict[str, Any], state: dict[str, Any]) -> Tensor | None:
        if "exp_avg" not in state:
            return None
        beta1, beta2 = group["betas"]
        step = state["step"]
        mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
        return mean / (square.sqrt() + group["eps"])


class XGradSGD(_Ahead, torch.optim.SGD):
    r"""SGD with momentum and XGrad's weight prediction, $w' = w - s\, \eta\, v$; see `XGradAdamW`.

    Args:
        params: as of SGD.
        lr: $\eta$.
        momentum: of v.
        weight_decay: added to the gradient, as in SGD.
        ahead: s, how many steps to look ahead.
        fused: as of SGD.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ahead: float = 1.0,
        fused: bool | None = None,
    ):
        super().__init__(params, lr, momentum, weight_decay=weight_decay, fused=fused)
        self._begin(ahead)

    def _direction(self, group: dict[str, Any], state: dict[str, Any]) -> Tensor | None:
        return state.get("momentum_buffer")
