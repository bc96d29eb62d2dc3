"""The parts that exported programs share: a loss, a training loop with the scaler a plan asks for, an inference loop.

Each part is source text that needs `torch`, `Any`, `Callable` and `Iterable` to be imported above it.
"""

from __future__ import annotations

from autoprec.plan import GradScalerSettings, Plan

__all__ = ["PREDICT", "scaler_arguments", "training_loop"]

_LOSS = '''

def model_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss that the model computes itself, as Hugging Face models do when given labels."""
    return model(**batch).loss.float()
'''

_TRAIN = '''

def train(
    model: torch.nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor] = model_loss,
    max_grad_norm: float = 1.0,
) -> list[float]:
    """Take one optimizer step for each batch and return the losses."""
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses
'''

_TRAIN_SCALED = '''

def make_scaler(model: torch.nn.Module) -> torch.amp.GradScaler:
    """Return the scaler that keeps FP16 gradients from vanishing; save its state_dict with your checkpoints."""
    device = next(model.parameters()).device.type
    return torch.amp.GradScaler(
        device,
{scaler}
    )


def train(
    model: torch.nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor] = model_loss,
    max_grad_norm: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """Take one optimizer step for each batch (skipped where gradients overflow) and return the losses."""
    model.train()
    scaler = scaler or make_scaler(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # so that the norm below is that of the true gradient
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses
'''

PREDICT = '''

@torch.inference_mode()
def predict(model: torch.nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Return the model's output for each batch."""
    model.eval()
    return [model(**batch) for batch in batches]
'''


def training_loop(plan: Plan) -> str:
    """Return `model_loss` and `train`, and `make_scaler` where the plan has FP16 in it."""
    if plan.grad_scaler is None:
        return _LOSS + _TRAIN
    return _LOSS + _TRAIN_SCALED.format(scaler=scaler_arguments(plan.grad_scaler, 8))


def scaler_arguments(settings: GradScalerSettings, indent: int) -> str:
    """Return the settings as keyword arguments of `torch.amp.GradScaler`, one a line, without the last line's end."""
    names = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")
    return "\n".join(f"{' ' * indent}{name}={getattr(settings, name)!r}," for name in names)
