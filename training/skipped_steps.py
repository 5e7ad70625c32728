"""Which steps are skipped: a loss or gradient norm that is not finite, or a spike of the gradient norm.

Everything is computed on the device from numbers that are the same on every rank, so that all ranks skip the same steps
and the host waits only where a number is logged or saved.
"""

import torch

from training.progress import Progress

WINDOW = 128  # gradient norms in the history from which a spike is told
MIN_HISTORY = 64  # norms before the first spike can be told


class SkippedSteps:
    """Judges and counts steps. `limit` steps in a row that are not finite end a run.

    `spikes` (optimizer.skip_spikes): skip a step whose gradient norm is more than so many standard deviations above the
    mean of the last `WINDOW` finite norms; None: skip no spikes. The norms of skipped spikes enter the history too, so that
    a lasting change of the norm is followed (as in OLMo-core's SkipStepOptimizer,
    https://github.com/allenai/OLMo-core). The history is saved with the run: a resumed run skips the same steps.
    """

    def __init__(self, progress: Progress, limit: int, spikes: float | None, device: torch.device) -> None:
        """Once `limit` steps in a row were bad the counter never returns to 0, so that the next look sees it."""
        self.limit, self.spikes = limit, spikes
        self.updates, self.skipped, self.in_a_row = (
            torch.tensor(count, device=device)
            for count in (progress.updates, progress.skipped_steps, progress.bad_steps_in_a_row)
        )
        self.norms = torch.zeros(WINDOW, dtype=torch.float64, device=device)  # the newest last
        self.positions = torch.arange(WINDOW, device=device)
        self.known = torch.tensor(0, device=device)
        if spikes and progress.norms:
            history = progress.norms[-WINDOW:]
            self.norms[-len(history) :] = torch.tensor(history, dtype=torch.float64, device=device)
            self.known += len(history)

    def judge(self, loss_sum: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether this step is skipped, as a bool scalar on the device; counts it. Both are sums over all ranks."""
        bad = ~(torch.isfinite(loss_sum) & torch.isfinite(grad_norm))
        skip = bad | self._is_spike(grad_norm, bad, self.spikes) if self.spikes else bad
        self.updates += ~skip
        self.skipped += skip
        keep = bad | (self.in_a_row >= self.limit)
        self.in_a_row = torch.where(keep, self.in_a_row + 1, torch.zeros_like(self.in_a_row))
        return skip

    def _is_spike(self, grad_norm: torch.Tensor, bad: torch.Tensor, limit: float) -> torch.Tensor:
        """Compare with the history, then add a finite norm to it."""
        known = self.positions >= WINDOW - self.known
        count = self.known.clamp(min=1)
        mean = (self.norms * known).sum() / count
        deviation = (((self.norms - mean) * known).square().sum() / count).sqrt()
        spike = (self.known >= MIN_HISTORY) & (grad_norm > mean + limit * deviation)
        shifted = torch.cat([self.norms[1:], grad_norm.detach().double().reshape(1)])
        self.norms = torch.where(bad, self.norms, shifted)
        self.known = torch.where(bad, self.known, (self.known + 1).clamp(max=WINDOW))
        return spike & ~bad

    def update(self, progress: Progress) -> bool:
        """Write the counts into `progress`; True if the limit is reached. The host waits for the device."""
        progress.updates, progress.skipped_steps = int(self.updates), int(self.skipped)
        progress.bad_steps_in_a_row = int(self.in_a_row)
        if self.spikes:
            progress.norms = self.norms[WINDOW - int(self.known) :].tolist()
        return progress.bad_steps_in_a_row >= self.limit
