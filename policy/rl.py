"""The objectives of the RL stage, behind one contract: the loop hands over groups and advantages and does not know
which of them it runs.

- :class:`GrpoProgram`: policy gradient on the recorded transitions of a rollout (clipped ratio, GRPO-Guard).
- :class:`NftProgram`: forward-process training on the rollout's clean latents (DiffusionNFT).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from pydantic import Field, model_validator

from common.config import StrictConfig
from data.seeding import seed_for
from policy.adapters import LoraConfig, add_reference, reference_active
from policy.dit import velocity
from policy.folder import export_policy, load_vae, starting_policy
from policy.group import GroupTrajectory, Recording
from policy.kernels import KernelConfig, Transition, standard_kl, transition
from policy.objectives import cells_like, clipped_loss, guarded_log_ratio, nft_loss
from policy.programs import Batch, MicroLoss, SftProgram
from policy.sampling import member_noise


class CreditConfig(StrictConfig):
    """Advantages for parts of a sample instead of one for all of it."""

    cells: int = Field(16, ge=2, le=64)
    """Cells along the longer side of an image; more than its latents have say nothing more."""
    reach: float = Field(0.1, gt=0, le=10, allow_inf_nan=False)
    """How far around itself a cell is credited with rewards: the standard deviation of a Gaussian, in longer sides of
    the image. A large one is the reward of the whole layer."""


class GrpoConfig(StrictConfig):
    """The clipped policy-gradient objective."""

    clip_range: float = Field(1e-4, gt=0)
    """ε of the clipped ratio. Its scale depends on latent size, kernel and Guard: choose it by the clip fraction."""
    guard: bool = False
    """GRPO-Guard: ratios centred and of one scale over all steps, losses divided by the step's −dt."""
    kl: float = Field(0.0, ge=0)
    """Weight of the Gaussian KL of each step to the policy that the stage started from."""
    old_log_probs: Literal["delivered", "recomputed"] = "delivered"
    """Denominator of the ratio: what the rollout actor computed, or the learner's own before its first update."""

    credit: CreditConfig | None = None
    """Local credit; None, as in the paper: one advantage for all of a sample."""

    @model_validator(mode="after")
    def _one_ratio(self) -> "GrpoConfig":
        if self.guard and self.credit:
            raise ValueError("guard corrects the ratio of a whole sample, and credit has one per cell: leave one out")
        return self

    @property
    def recording(self) -> Recording:
        """What rollouts must carry."""
        return Recording(means=self.guard or self.credit is not None)


class NftConfig(StrictConfig):
    """The forward-process objective (DiffusionNFT, arXiv 2509.16117)."""

    beta: float = Field(1.0, gt=0)
    """β: how far the implicit positive and negative policies lie from the old one."""
    advantage_max: float = Field(5.0, gt=0)
    """A_max: advantages from −A_max to A_max become optimality probabilities from 0 to 1."""
    kl: float = Field(0.0, ge=0)
    """Weight of the squared velocity difference to the policy that the stage started from."""
    times: int = Field(4, ge=1)
    """Noise levels per group, drawn from the sampling schedule without repetition."""

    @property
    def recording(self) -> Recording:
        """What rollouts must carry."""
        return Recording(window=False, times=self.times)


RlMicro = tuple[GroupTrajectory, np.ndarray, int]
"""A group, its advantages (G,), or (G, L, h, w) with local credit, NaN for members that lost their scores, and the
place of one trained step."""

Demonstration = tuple[Batch, float]
"""Records for the supervised loss, and what each of them counts in the sum of the policy's losses."""


class SupervisedConfig(StrictConfig):
    """SFT's loss beside the policy's, on records that SFT has not had (PPO-ptx, arXiv 2203.02155)."""

    weight: float = Field(gt=0)
    """Of the mean supervised loss beside the mean loss of the policy."""
    micro_batches: int = Field(4, ge=1)
    """Backward calls per optimiser step over all ranks, of ``sft.micro_batch`` records each."""


@dataclass(frozen=True)
class Start:
    """Where the stage's policy comes from."""

    policy: Path
    """Policy folder."""
    lora: LoraConfig | None = None
    """Adapter to train; None trains all weights."""
    seed: int = 0
    """Of a fresh adapter."""


Supervised = Callable[[QwenImageTransformer2DModel], SftProgram]
"""Makes the supervised program round the transformer that the policy's objective trains."""


class RlProgram:
    """What both objectives share: the policy, the policy it started from, one micro-batch per step of a group."""

    def __init__(self, start: Start, kl: float, supervised: Supervised | None = None) -> None:
        """``supervised`` makes the supervised program of a transformer, where its loss is added."""
        self._start = start
        # Evaluation mode, as in the sampler: the ratio of an unchanged policy is exactly 1.
        self.module = starting_policy(start.policy, start.lora, start.seed).eval()
        self._frozen: torch.nn.Module | None = None
        if kl and start.lora:
            add_reference(self.module)
        elif kl:
            self._frozen = deepcopy(self.module).requires_grad_(False)
        self._device = self.module.device
        self._demonstrated = supervised(self.module) if supervised else None

    def place(self, device: torch.device) -> None:
        """As :class:`policy.programs.Program` wants it."""
        self._device = device
        self.module.to(device)
        if self._frozen is not None:
            self._frozen.to(device)
        if self._demonstrated is not None:
            self._demonstrated.place(device)

    def begin_batch(self, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Called on every rank before the first update on a batch of rollouts."""

    def micro_batches(
        self, payload: GroupTrajectory | Batch, extra: np.ndarray | float
    ) -> Sequence[RlMicro | Demonstration]:
        if isinstance(payload, Batch):
            assert isinstance(extra, float)
            return [(payload, extra)]
        assert isinstance(extra, np.ndarray)
        return [(payload, extra, place) for place in range(len(payload.steps))]

    def loss(self, model: torch.nn.Module, micro: RlMicro | Demonstration) -> MicroLoss:
        """Forwards ``model`` on one step of a group, or on records that show what is right."""
        if len(micro) == 3:
            return self.group_loss(model, micro)
        assert self._demonstrated is not None
        batch, share = micro
        found = self._demonstrated.loss(model, batch)
        # It adds nothing to the count: the mean stays that of the policy's terms.
        return MicroLoss(found.total * share, 0, {"supervised": found.stats["mse"] * share})

    def group_loss(self, model: torch.nn.Module, micro: RlMicro) -> MicroLoss:
        """The objective on one step of a group."""
        raise NotImplementedError

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        start = self._start
        export_policy(folder, load_vae(start.policy), self.module, weights, start.lora, start.policy)

    @torch.no_grad()
    def _reference(
        self, model: torch.nn.Module, group: GroupTrajectory, states: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        """Velocity of the policy that the stage started from."""
        if self._frozen is not None:
            return _velocity(self._frozen, group, states, sigma)
        with reference_active(self.module):
            return _velocity(model, group, states, sigma)


class GrpoProgram(RlProgram):
    """Clipped GRPO on the recorded window transitions: one micro-batch is one step of one group."""

    def __init__(
        self,
        start: Start,
        config: GrpoConfig,
        kernel: KernelConfig,
        sigmas: Sequence[float],
        supervised: Supervised | None = None,
    ) -> None:
        super().__init__(start, config.kl, supervised)
        self._config, self._kernel, self._sigmas = config, kernel, tuple(sigmas)

    def group_loss(self, model: torch.nn.Module, micro: RlMicro) -> MicroLoss:
        group, advantages_G, place = micro
        advantages = torch.tensor(advantages_G, dtype=torch.float32).to(self._device)
        kept = ~advantages.flatten(1).isnan().any(1) if advantages.ndim > 1 else ~advantages.isnan()
        config, step = self._config, group.steps[place]
        states, sigma = group.states(place, self._device), self._sigmas[step]
        if config.kl:  # first: it switches adapters, which must not touch the graph of the trained one
            reference = self._transition(states, self._reference(model, group, states, sigma), step)
        # Every member is forwarded, also those without a score: the ratio is exact only at the rollout's batch shape.
        move = self._transition(states, _velocity(model, group, states, sigma), step)
        log_probs = move.log_prob(group.states(place + 1, self._device))
        log_ratios = log_probs - torch.tensor(group.log_probs_GW[:, place]).to(self._device)
        shown, scale = log_ratios.detach()[kept].double(), 1.0
        if config.guard:
            assert group.means_GWMCHW is not None
            drift = standard_kl(move.mean, torch.tensor(group.means_GWMCHW[:, place]).to(move.mean), move.scale)
            log_ratios, scale = guarded_log_ratio(log_ratios, drift, move.scale), 1 / (sigma - self._sigmas[step + 1])
        ratios = log_ratios[kept].detach().exp()
        if advantages.ndim > 1:
            log_ratios = self._cell_log_ratios(group, place, move)
            advantages = cells_like(advantages, log_ratios)
        result = clipped_loss(log_ratios[kept], advantages[kept], config.clip_range)
        # With local credit a member's loss is the mean over its cells.
        losses = result.losses_B.flatten(1).mean(1) if advantages.ndim > 1 else result.losses_B * scale
        stats = {
            "ratio": float(ratios.sum()),
            "max_ratio": float(ratios.max()),
            "max_ratio_error": float((ratios - 1).abs().max()),
            "clipped": float(result.clipped_B.float().reshape(len(losses), -1).mean(1).sum()),
            # Schulman's k3 estimator, without Guard; r − 1 − log r in float32 would be rounding alone.
            "approx_kl": float((torch.expm1(shown) - shown).sum()),
        }
        if config.kl:
            kl = standard_kl(move.mean, reference.mean, move.scale)[kept]
            losses = losses + config.kl * kl
            stats["kl"] = float(kl.detach().sum())
        return MicroLoss(losses.sum(), int(kept.sum()), stats)

    def _cell_log_ratios(self, group: GroupTrajectory, place: int, move: Transition) -> torch.Tensor:
        """Of each cell of each member's latents to the sampling policy, (G, M, H, W)."""
        assert group.means_GWMCHW is not None
        before = replace(move, mean=torch.tensor(group.means_GWMCHW[:, place]).to(move.mean))
        after = group.states(place + 1, self._device)
        return move.cell_log_probs(after) - before.cell_log_probs(after)

    @torch.no_grad()
    def recompute(self, model: torch.nn.Module, group: GroupTrajectory) -> tuple[GroupTrajectory, float]:
        """The group with this model's own log-probabilities and means, and the largest |ratio − 1| to the delivered."""
        moves = []
        for place, step in enumerate(group.steps):
            states = group.states(place, self._device)
            moves.append(self._transition(states, _velocity(model, group, states, self._sigmas[step]), step))
        after = (group.states(place + 1, self._device) for place in range(len(moves)))
        log_probs = torch.stack([move.log_prob(state) for move, state in zip(moves, after, strict=True)], 1).cpu()
        error = float(((log_probs - torch.tensor(group.log_probs_GW)).exp() - 1).abs().max())
        means = torch.stack([m.mean for m in moves], 1).cpu().numpy() if self._config.recording.means else None
        return replace(group, log_probs_GW=log_probs.numpy(), means_GWMCHW=means), error

    def _transition(self, states: torch.Tensor, velocity_GMCHW: torch.Tensor, step: int) -> Transition:
        sigmas = self._sigmas
        return transition(self._kernel, states, velocity_GMCHW, sigmas[step], sigmas[step + 1], sigmas[1])


class NftProgram(RlProgram):
    """DiffusionNFT on the clean latents of a rollout: one micro-batch is one noise level of one group.

    The old policy is the one that sampled the group; the paper lets it trail the trained one by an exponential average,
    and samples from it. It is a whole second copy of the model on every rank, with an adapter too.
    """

    def __init__(
        self, start: Start, config: NftConfig, sigmas: Sequence[float], supervised: Supervised | None = None
    ) -> None:
        super().__init__(start, config.kl, supervised)
        self._config, self._sigmas = config, tuple(sigmas)
        self._old = deepcopy(self.module).requires_grad_(False)

    def place(self, device: torch.device) -> None:
        super().place(device)
        self._old.to(device)

    def begin_batch(self, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        # With an adapter only its tensors come, so that names may be missing, but none may be unknown.
        unknown = self._old.load_state_dict(dict(weights()), strict=False).unexpected_keys
        assert not unknown, f"weights of another model: {unknown[:3]}"

    def group_loss(self, model: torch.nn.Module, micro: RlMicro) -> MicroLoss:
        group, advantages_G, place = micro
        advantages = torch.tensor(advantages_G, dtype=torch.float32).to(self._device)
        kept = ~advantages.isnan()
        config, time = self._config, self._sigmas[group.steps[place]]
        clean = torch.tensor(group.clean_GMCHW).to(self._device)
        noise = torch.stack([member_noise(clean.shape[1:], *group.key, g, f"nft {place}") for g in range(len(clean))])
        noise = noise.to(clean)
        noisy = (1 - time) * clean + time * noise
        if config.kl:
            reference = self._reference(model, group, noisy, time)
        with torch.no_grad():
            old = _velocity(self._old, group, noisy, time)
        output = _velocity(model, group, noisy, time)
        # Members without a score are left out before the loss: their NaN would reach the gradient through a zero.
        losses = nft_loss(
            output[kept], old[kept], noisy[kept], clean[kept], time, advantages[kept], config.beta, config.advantage_max
        )
        stats = {"drift": float(((output.detach() - old) ** 2).flatten(1).mean(1)[kept].sum())}
        if config.kl:
            apart = ((output - reference) ** 2).flatten(1).mean(1)[kept]
            losses = losses + config.kl * apart
            stats["kl"] = float(apart.detach().sum())
        return MicroLoss(losses.sum(), int(kept.sum()), stats)


def training_times(key: tuple[int, int, int], times: int, steps: int) -> tuple[int, ...]:
    """Distinct schedule steps of a group at which a forward-process loss trains: a function of its arguments alone."""
    picked = np.random.default_rng(seed_for(key[0], "times", *key[1:])).choice(steps, size=times, replace=False)
    return tuple(sorted(int(step) for step in picked))


def _velocity(model: torch.nn.Module, group: GroupTrajectory, states: torch.Tensor, sigma: float) -> torch.Tensor:
    condition = group.condition().to(states.device)
    times = torch.full((len(states),), sigma, device=states.device)
    # Losses and densities are computed in float32, whatever the model computed in.
    return velocity(model, states, times, condition.inputs_BNCHW, condition.text_BTD, condition.text_mask_BT).float()
