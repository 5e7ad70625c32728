"""AdamW in 16, 14, 12, 8 or 6 bytes a parameter: what is kept in fp32, and bf16 weights that move all the same.

    optimizer.memory   weights   gradients   moments   bytes a parameter
    16N                fp32      fp32        fp32      4 + 4 + 8
    14N                bf16      fp32        fp32      2 + 4 + 8
    12N                bf16      bf16        fp32      2 + 2 + 8
    8N                 bf16      bf16        bf16      2 + 2 + 4
    6N                 bf16      bf16        8 bits    2 + 2 + 2, and the scales: 8 bytes a block of 32 to 256

A bf16 number has 8 bits of precision, so that a step of 2e-5 on a weight of 0.02 is usually less than half of the gap to
the next one: rounding to nearest loses it, step after step. Stochastic rounding goes up or down with the probability
that makes the mean right (Zamirai et al., arXiv:2010.06192).
"""

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from common.errors import UserError
from distributed.sharding import local_shard

# Elements that are worked on at once: bounds the fp32 copies. On a CPU they stay in its cache.
CHUNK = {"cpu": 2**16, "cuda": 2**24}
MASK = 0xFFFFFFFF


class Settings(Protocol):
    """What is read of the config's `optimizer` section."""

    memory: str
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def parameter_dtype(memory: str) -> torch.dtype:
    """What the sharded weights are kept in."""
    return torch.float32 if memory == "16N" else torch.bfloat16


def check_memory(memory: str) -> None:
    """Raises UserError where 14N or 6N needs what is not installed: before anything is started."""
    if memory == "14N" and not hasattr(torch.Tensor, "grad_dtype"):
        raise UserError(
            f"optimizer.memory=14N keeps fp32 gradients of bf16 weights, which torch {torch.__version__} cannot: choose 12N or 16N"
        )
    if memory == "6N":
        try:
            from torchao.optim.quant_utils import create_dynamic_map  # noqa: F401
        except ImportError as error:
            raise UserError(
                "optimizer.memory=6N keeps its moments in 8 bits through torchao: pip install torchao"
            ) from error


def make_optimizer(parameters: dict[str, nn.Parameter], settings: Settings, seed: int) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) with weight decay on matrices only, its moments in place and zero.

    parameters: all of the model's by name, in the same order on every rank, in `parameter_dtype(settings.memory)`. The
    loop sets `lr` and, for the noise of the rounding, `noise_step` (0-based) in every group, and `optimizer.found_inf`: where
    that is 1 the step changes nothing.
    """
    wanted = parameter_dtype(settings.memory)
    wrong = [name for name, parameter in parameters.items() if parameter.dtype != wanted]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is {parameters[wrong[0]].dtype}, optimizer.memory={settings.memory} keeps {wanted}"
        )
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if settings.memory == "16N":
        optimizer = torch.optim.AdamW(groups, **options, fused=True)
        for parameter in parameters.values():  # before the first step, so that a checkpoint can be read into place
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": step} | _new_moments(parameter, "16N")
        return optimizer
    order = {parameter: index for index, parameter in enumerate(parameters.values())}
    return LowMemoryAdamW(groups, **options, memory=settings.memory, seed=seed, order=order)


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights: fp32 arithmetic chunk by chunk, stochastic rounding, and nothing waits on the device.

    It works on this rank's own rows (or on plain tensors). `found_inf` and `grad_scale` (None, or fp32 tensors of one
    element that the loop sets) mean what they mean to torch's fused AdamW: the step is not taken; gradients are divided.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        memory: str,
        seed: int,
        order: dict[nn.Parameter, int],
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "noise_step": None})
        self.found_inf: torch.Tensor | None = None
        self.grad_scale: torch.Tensor | None = None
        self.keeps_gradients = memory == "14N"
        self.seed, self.order = seed, order
        device = next(iter(order)).device
        self.maps = _code_maps(device) if memory == "6N" else {}
        # One counter for all: every parameter takes part in every step.
        self.steps = torch.zeros((), dtype=torch.float32, device=device)
        for parameter in order:
            self.state[parameter] = {"step": self.steps} | _new_moments(parameter, memory)
            if self.keeps_gradients:
                _keep_fp32_gradient(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Under 14N the gradients stay, filled with zeros: FSDP adds to a gradient that is there in its own dtype."""
        super().zero_grad(set_to_none and not self.keeps_gradients)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient. Nothing changes to the last bit where `found_inf` is 1."""
        device = self.steps.device
        bad = torch.zeros((), dtype=torch.bool, device=device)
        if self.found_inf is not None:
            bad = self.found_inf.to(device).reshape(()) != 0
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale.to(device).reshape(())
        self.steps += ~bad
        for group in self.param_groups:
            if group["noise_step"] is None:
                raise ValueError(
                    "set noise_step in every group before each step: the noise of the rounding is drawn from it"
                )
            scalars = _scalars(group, self.steps, scale, bad)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, scalars, bad)

    def _update(self, parameter: nn.Parameter, group: dict, scalars: dict, bad: torch.Tensor) -> None:
        local, row = local_shard(parameter)
        if local.numel() == 0:  # more ranks than rows
            return
        first = row * (parameter.numel() // parameter.shape[0]) if parameter.dim() else 0
        weight, grad = local.view(-1), _local(parameter.grad).reshape(-1)
        moments = {key: _local(value).view(-1) for key, value in self.state[parameter].items() if key != "step"}
        # Streams of noise of their own for the weight and the two moments.
        keys = {
            what: noise_key(self.seed, 3 * self.order[parameter] + i, group["noise_step"])
            for i, what in enumerate(("weight", "exp_avg", "exp_avg_sq"))
        }
        size = CHUNK["cuda" if local.is_cuda else "cpu"]
        if "exp_avg_codes" in moments:
            block = weight.numel() // moments["exp_avg_scale"].numel()
            size = size // block * block
        for start in range(0, weight.numel(), size):
            part = slice(start, min(start + size, weight.numel()))
            # Finite in a good step; in a bad one all of it becomes zero, which NaN times zero would not.
            g = torch.nan_to_num(grad[part].float(), nan=0.0, posinf=0.0, neginf=0.0).mul_(scalars["gradient"])
            exp_avg = self._read(moments, "exp_avg", part)
            exp_avg_sq = self._read(moments, "exp_avg_sq", part)
            value = weight[part].float()
            adamw_(value, g, exp_avg, exp_avg_sq, group, scalars)
            weight[part].copy_(stochastic_round_(value, keys["weight"], first + start))
            self._write(moments, "exp_avg", part, exp_avg, keys, first + start, bad)
            self._write(moments, "exp_avg_sq", part, exp_avg_sq, keys, first + start, bad)

    def _read(self, moments: dict[str, torch.Tensor], key: str, part: slice) -> torch.Tensor:
        """A chunk of a moment in fp32; of an fp32 moment the memory itself."""
        if key in moments:
            return moments[key][part].float()
        from torchao.optim.quant_utils import dequant_with_qmap

        codes, scale = moments[f"{key}_codes"], moments[f"{key}_scale"]
        block = codes.numel() // scale.numel()
        value = dequant_with_qmap(codes[part], self.maps[key][0], scale[part.start // block : part.stop // block])
        return value.square_() if key == "exp_avg_sq" else value

    def _write(
        self,
        moments: dict[str, torch.Tensor],
        key: str,
        part: slice,
        value: torch.Tensor,
        keys: dict[str, tuple[int, int]],
        first: int,
        bad: torch.Tensor,
    ) -> None:
        """Put a chunk of a moment back. bf16 ones are rounded as the weights are: at beta 0.999 they would never decay."""
        if key in moments:
            if moments[key].dtype == torch.bfloat16:
                moments[key][part].copy_(stochastic_round_(value, keys[key], first))
            return
        from torchao.optim.quant_utils import scale_tensor

        codes, scale = moments[f"{key}_codes"], moments[f"{key}_scale"]
        block = codes.numel() // scale.numel()
        # The root is stored: it spans as many powers of ten as the first moment. The square of a small gradient would
        # become 0 where the first moment does not, and the update m / eps. The scale, too, has a floor of 1e-12.
        scaled, new_scale = scale_tensor(value.sqrt_() if key == "exp_avg_sq" else value, block)
        new_codes = torch.bucketize(scaled, self.maps[key][1], right=True, out_int32=True).to(torch.uint8)
        # The largest of a block is -0.993 of its scale where it is negative, so writing back is not the identity.
        codes, scale = codes[part], scale[part.start // block : part.stop // block]
        codes.copy_(torch.where(bad, codes, new_codes))
        scale.copy_(torch.where(bad, scale, new_scale))


def adamw_(
    value: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    group: dict,
    scalars: dict[str, torch.Tensor],
) -> None:
    """torch.optim.AdamW's update of flat fp32 tensors, in place; `scalars` are on the device."""
    beta1, beta2 = group["betas"]
    exp_avg.mul_(scalars["beta1"]).add_(grad, alpha=1 - beta1)  # the gradient of a bad step is zero by now
    exp_avg_sq.mul_(scalars["beta2"]).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(scalars["root"]).add_(group["eps"])
    if group["weight_decay"]:
        value.mul_(scalars["decay"])
    value.addcmul_(torch.div(exp_avg, denominator, out=denominator), scalars["rate"], value=-1)


def _scalars(group: dict, steps: torch.Tensor, scale: torch.Tensor, bad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The step's factors as fp32 scalars on the device, those of a bad step such that nothing changes.

    Numbers get there by kernels that fill: torch.tensor(number, device) and torch.where(bad, number, ...) would wait.
    """
    (beta1, beta2), steps = group["betas"], steps.double()
    values = {
        "gradient": (1 / scale, 0.0),
        "beta1": (beta1, 1.0),
        "beta2": (beta2, 1.0),
        "decay": (1 - group["lr"] * group["weight_decay"], 1.0),
        "root": ((1 - beta2**steps).sqrt(), 1.0),
        "rate": (group["lr"] / (1 - beta1**steps), 0.0),
    }
    return {
        name: (value if isinstance(value, torch.Tensor) else torch.full_like(steps, value))
        .masked_fill(bad, if_bad)
        .float()
        for name, (value, if_bad) in values.items()
    }


def noise_key(seed: int, stream: int, step: int) -> tuple[int, int]:
    """Two 32-bit words from the run's seed, the number of the tensor in the whole model and the step."""
    key = 0
    for word in (seed, stream, step):
        key = (key + word + 0x9E3779B97F4A7C15) & (2**64 - 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
            key = ((key ^ (key >> shift)) * factor) & (2**64 - 1)
        key ^= key >> 31
    return key & MASK, key >> 32


def noise(key: tuple[int, int], first: int, count: int, device: torch.device) -> torch.Tensor:
    """int32 (count,), uniform in 0 ... 65535: a pure function of the key and of the global indices first, first + 1, ...

    So it is the same however a tensor is split over ranks. A 32-bit word, hashed from half the index, serves two
    neighbours; beyond 2^33 elements of one tensor the noise repeats. int32 products wrap around.
    """
    word = torch.arange((first + count + 1) // 2 - first // 2, dtype=torch.int32, device=device)
    word.add_(_signed(first // 2 + key[0]))
    scramble_(word, _signed(key[1]))
    return word.view(torch.int16)[first % 2 : first % 2 + count].int().bitwise_and_(0xFFFF)


def scramble_(word: torch.Tensor, key: int | torch.Tensor) -> torch.Tensor:
    """int32 words as random ones, in place: `lowbias32` of C. Wellons' hash-prospector, `key` added between its products."""
    for shift, mask, factor, addend in ((16, 0xFFFF, 0x7FEB352D, key), (15, 0x1FFFF, 0x846CA68B, 0)):
        word.bitwise_xor_((word >> shift).bitwise_and_(mask))  # the mask makes the shift a logical one
        word.mul_(_signed(factor)).add_(addend)
    return word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))


def stochastic_round_(value: torch.Tensor, key: tuple[int, int], first: int) -> torch.Tensor:
    """Round fp32 values to bf16 ones in place, up or down so that the mean is right; `first`: global index of value[0].

    The 16 bits that bf16 lacks and 16 random bits are added, what they carry goes to the rest, and they are cut off. A
    value that bf16 holds stays as it is.
    """
    bits = value.view(torch.int32)
    bits.add_(noise(key, first, value.numel(), value.device)).bitwise_and_(-0x10000)
    return value


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Euclidean norm of all gradients together, fp32 scalar, the same on every rank; nothing is clipped here.

    torch's `clip_grad_norm_` computes in the dtype of the gradients, which is too coarse in bf16, and takes another pass
    to scale them; the optimizer divides by `grad_scale` as it reads them. Every rank calls it: a sum over shards.
    """
    gradients = [parameter.grad for parameter in parameters]
    norms = torch._foreach_norm([_local(gradient) for gradient in gradients], 2, dtype=torch.float32)
    square = torch.stack(norms).square().sum()
    if isinstance(gradients[0], DTensor):
        mesh = gradients[0].device_mesh  # replicated over a first dimension, if there are two
        dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
    return square.sqrt()


def bytes_per_parameter(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What this rank's tensors take: bytes of weights, gradients and moments a parameter, and their sum `total`.

    Read from shapes and dtypes alone. Call it between backward and zero_grad: a gradient that is not there counts 0.
    """

    def size(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else _local(tensor).numel() * tensor.dtype.itemsize

    count = max(1, sum(_local(p).numel() for p in parameters.values()))
    states = [value for p in parameters.values() for key, value in optimizer.state[p].items() if key != "step"]
    parts = {
        "weights": sum(size(p) for p in parameters.values()) / count,
        "gradients": sum(size(p.grad) for p in parameters.values()) / count,
        "moments": sum(size(value) for value in states) / count,
    }
    return parts | {"total": sum(parts.values())}


def _new_moments(parameter: nn.Parameter, memory: str) -> dict[str, torch.Tensor]:
    """Zero moments, laid out over the ranks as the parameter is, so that a checkpoint can be spread anew by rows."""
    block = _block(parameter) if memory == "6N" else None
    moments = {}
    for key in ("exp_avg", "exp_avg_sq"):
        if block:
            moments[f"{key}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            moments[f"{key}_scale"] = _row_scales(parameter, block)
        else:
            moments[key] = torch.zeros_like(parameter, dtype=torch.bfloat16 if memory == "8N" else torch.float32)
    return moments


def _block(parameter: nn.Parameter) -> int | None:
    """Elements that share a scale: the largest divisor of a row from 256 down to 32, so that no block spans two ranks."""
    if parameter.dim() < 2 or parameter.numel() == 0:
        return None  # vectors, a thousandth of the model, keep fp32 moments
    row = parameter.numel() // parameter.shape[0]
    return next((size for size in range(256, 31, -1) if row % size == 0), None)


def _row_scales(parameter: nn.Parameter, block: int) -> torch.Tensor:
    """Zeros of shape (rows, blocks in a row), sharded like the parameter's rows."""
    shape = (parameter.shape[0], parameter.numel() // parameter.shape[0] // block)
    local = torch.zeros((_local(parameter).shape[0], shape[1]), dtype=torch.float32, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return local
    scales = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=(shape[1], 1),
    )
    return scales.to(parameter.device)  # with CPU offload from_local has moved it to the mesh's device


def _keep_fp32_gradient(parameter: nn.Parameter) -> None:
    """14N: FSDP reduces in fp32 but hands gradients out in the parameter's dtype, unless it can add to one that is there.

    What a micro-batch adds has been rounded to bf16 once; the sum over micro-batches is fp32.
    """
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def _code_maps(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each moment the 256 values of the dynamic 8-bit type (Dettmers et al., arXiv:2110.02861) and their midpoints."""
    from torchao.optim.quant_utils import create_dynamic_map

    maps = {}
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = torch.tensor(create_dynamic_map(signed), dtype=torch.float32)
        maps[key] = values.to(device), ((values[1:] + values[:-1]) / 2).to(device)
    return maps


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _signed(word: int) -> int:
    """The int32 with the same bits."""
    word &= MASK
    return word - 2**32 if word >= 2**31 else word
