"""The world model: observation embedding, RSSM, decoders and the training loss, in named sizes.

`small` trains on two CPU cores: frozen image codes, residual latents, multi-step open-loop loss.
`paper` is DiWA's recipe: end-to-end CNNs, categorical latents, pixel and KL losses, 39.9 M parameters.
Every choice is a switch of `WorldModelConfig`, so that each can be compared with the paper's.
Letters: B batch, T time, E embedding, P proprio (27), A action (7).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diwa_core.contract import ACTION_SIZE, PROPRIO_SIZE, Contract
from diwa_core.errors import ConfigError
from diwa_core.world_model.command import CommandedPose, from_lag, to_lag
from diwa_core.world_model.distributed import RandomSource, normal_like
from diwa_core.world_model.rssm import RSSM, CategoricalLatent, ResidualLatent, State
from diwa_core.world_model.vision import ConvDecoder, ConvEncoder, ImageCode, to_float


@dataclass(frozen=True)
class WorldModelConfig:
    """Architecture and loss of a world model; sizes are numbers of units."""

    name: str = "small"
    views: tuple[str, ...] = ("rgb_static", "rgb_gripper")
    scene_size: int = 0  # low-dimensional variant: the first entries of scene_obs are observed (simulation only)
    vision: str = "code"  # code: frozen ImageCode; cnn: end-to-end
    code_sizes: tuple[int, ...] = (48, 32)
    cnn_width: int = 48
    latent: str = "residual"  # residual | categorical
    stochastic: bool = False  # residual latents only
    groups: int = 32
    classes: int = 32
    deterministic: int = 512
    hidden: int = 512
    observation_gain: float = 0.1  # residual latents: the share of a surprise that is believed at once; 1 believes every frame
    warmup_frames: int = 4  # frames filtered after a reset before a feature is used
    leash_m: float = 0.08  # how far the commanded position may lead the measured one
    proprio_weight: float = 4.0  # of an entry of the proprioception in the prediction loss; an entry of a code weighs about 1
    state_weight: float = 10.0  # of a code component, times how two-peaked it is, beside 1
    code_noise: float = 0.05  # standard deviations, on observed codes while training
    huber_width: float = 0.05  # standard deviations: below it errors count squared, above it linearly
    reconstruction_scale: float = 0.5  # pixels (cnn) or embedding (code) of categorical latents
    kl_scale: float = 0.3
    kl_balance: float = 0.8

    def __post_init__(self) -> None:
        choices = {"vision": ("code", "cnn"), "latent": ("residual", "categorical")}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"world model '{key}': expected one of {allowed}, found '{getattr(self, key)}'.")
        if self.latent == "residual" and self.vision == "cnn" and self.views:
            raise ConfigError("residual latents predict the embedding, so it must be frozen: set 'vision: code' or 'latent: categorical'.")
        if self.vision == "code" and len(self.code_sizes) != len(self.views):
            raise ConfigError(f"code_sizes needs one size for each of the views {self.views}, found {self.code_sizes}.")

    @property
    def frozen_embedding(self) -> bool:
        """Whether the embedding of a frame never changes while the recurrent part trains."""
        return self.vision == "code"


_OBSERVATION = ("views", "scene_size", "vision", "code_sizes", "leash_m")  # what the embedding of a frame depends on

SIZES = {
    "small": WorldModelConfig(),
    "lowdim": WorldModelConfig(name="lowdim", views=(), code_sizes=(), scene_size=6, deterministic=256, hidden=256),
    "paper": WorldModelConfig(name="paper", vision="cnn", latent="categorical", deterministic=1024, hidden=1000, proprio_weight=0.0),
}


class WorldModel(nn.Module):
    """Embedding -> RSSM -> decoders. All public methods take and return tensors on the module's device."""

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config
        low_dimensional = PROPRIO_SIZE + config.scene_size
        contract = Contract()
        self.command = CommandedPose(contract.max_delta_m, contract.max_delta_rad, config.leash_m, low_dimensional)
        self.register_buffer("low_mean", torch.zeros(low_dimensional))
        self.register_buffer("low_std", torch.ones(low_dimensional))
        self.codes, self.cnns = nn.ModuleDict(), nn.ModuleDict()
        if config.vision == "code":
            for view, size in zip(config.views, config.code_sizes, strict=True):
                self.codes[view] = ImageCode(size, PROPRIO_SIZE).requires_grad_(False)
            self.embedding_size = low_dimensional + sum(config.code_sizes)
        else:
            for view in config.views:
                self.cnns[view] = ConvEncoder(config.cnn_width)
            fused = 32 * config.cnn_width
            self.fuse = nn.Sequential(nn.Linear(fused * len(config.views), fused), nn.LayerNorm(fused), nn.ELU())
            self.embedding_size = low_dimensional + fused
        if config.latent == "residual":
            sizes = (config.deterministic, config.hidden, self.embedding_size, ACTION_SIZE)
            latent: nn.Module = ResidualLatent(*sizes, config.stochastic, config.observation_gain, self.command)
        else:
            latent = CategoricalLatent(config.deterministic, config.hidden, self.embedding_size, config.groups, config.classes)
        self.rssm = RSSM(latent, config.deterministic, config.hidden, ACTION_SIZE)
        self._build_decoders(low_dimensional)

    def _build_decoders(self, low_dimensional: int) -> None:
        """Residual latents need none: the latent is the embedding."""
        config, feature = self.config, self.rssm.feature_size
        if config.latent == "residual":
            return
        if config.vision == "code":
            layers = nn.Linear(feature, config.hidden), nn.ELU(), nn.Linear(config.hidden, self.embedding_size)
            self.embedding_decoder = nn.Sequential(*layers)
            return
        self.image_in = nn.Linear(feature, 32 * config.cnn_width)
        self.image_decoders = nn.ModuleDict({view: ConvDecoder(config.cnn_width) for view in config.views})
        if config.proprio_weight:
            self.low_decoder = nn.Sequential(nn.Linear(feature, config.hidden), nn.ELU(), nn.Linear(config.hidden, low_dimensional))

    @property
    def feature_size(self) -> int:
        """Length of State.feature."""
        return self.rssm.feature_size

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.low_mean.device

    @property
    def two_peaked(self) -> Tensor:
        """How two-peaked each code component is [sum of code sizes]: the scene's lasting states, found without labels."""
        return torch.cat([code.two_peaked for code in self.codes.values()]) if self.codes else self.low_mean.new_zeros(0)

    # ---- observations -------------------------------------------------------------------------------------------------------------

    def measure_low(self, low: Tensor) -> None:
        """Set the statistics of proprio (and scene) from [N, P(+S)]."""
        self.low_mean.copy_(low.mean(0))
        self.low_std.copy_(low.std(0).clamp_min(1e-2))
        self.command.measure(to_lag(low))

    def take_observation(self, other: WorldModel) -> None:
        """Take over another model's statistics and frozen image codes: embeddings of both are then the same.

        Raises ConfigError if the two observe differently.
        """
        mine, theirs = (replace(SIZES["small"], **{k: getattr(m.config, k) for k in _OBSERVATION}) for m in (self, other))
        if mine != theirs or not self.config.frozen_embedding:
            raise ConfigError(f"codes can be shared between models of equal views and sizes of codes only: {theirs} is not {mine}.")
        names = ("low_mean", "low_std", "command", "codes")
        source = {key: value for key, value in other.state_dict().items() if key.split(".")[0] in names}
        self.load_state_dict(self.state_dict() | source)

    def standardise_low(self, low: Tensor) -> Tensor:
        """Proprio (and scene) [.., P(+S)] in units of their deviation on the play."""
        return (low - self.low_mean) / self.low_std

    def embed(self, low: Tensor, images: dict[str, Tensor]) -> Tensor:
        """low [N, P(+S)] in physical units and uint8 images [N, 64, 64, 3] -> embedding [N, E]."""
        parts = [self.command.standardise(to_lag(low))]
        if self.config.vision == "code":
            proprio = self.standardise_low(low)[:, :PROPRIO_SIZE]
            with torch.no_grad():
                parts += [self.codes[view].encode(images[view], proprio) for view in self.config.views]
        else:
            parts.append(self.fuse(torch.cat([self.cnns[view](to_float(images[view])) for view in self.config.views], -1)))
        return torch.cat([part.float() for part in parts], -1)

    # ---- what a state looks like --------------------------------------------------------------------------------------------------

    def decode_embedding(self, state: State) -> Tensor:
        """The embedding [.., E] a state stands for (models with a frozen image code)."""
        return state.z if self.config.latent == "residual" else self.embedding_decoder(state.feature)

    def decode_low(self, state: State) -> Tensor | None:
        """Proprio (and scene) [.., P(+S)] in physical units, or None where the recipe has no such decoder (the paper's)."""
        if self.config.vision == "cnn":
            normalised = self.low_decoder(state.feature) if self.config.proprio_weight else None
        else:
            normalised = self.decode_embedding(state)[..., : self.low_mean.shape[0]]
        return None if normalised is None else from_lag(self.command.restore(normalised))

    def decode_images(self, state: State) -> dict[str, Tensor]:
        """Name -> float images [N, 3, 64, 64] in [-1, 1] of states [N, ..]."""
        config = self.config
        if config.vision == "cnn":
            hidden = self.image_in(state.feature)
            return {view: self.image_decoders[view](hidden) for view in config.views}
        embedding = self.decode_embedding(state)
        proprio = self.standardise_low(self.decode_low(state))[..., :PROPRIO_SIZE]
        codes = embedding[..., self.low_mean.shape[0] :]
        parts = codes.split(list(config.code_sizes), -1) if config.views else ()
        return {view: self.codes[view].decode(code, proprio) for view, code in zip(config.views, parts, strict=True)}

    # ---- training -----------------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict, state: State, generator: RandomSource = None) -> tuple[Tensor, dict[str, float], State]:
        """Loss of a batch of sequences, its parts, and the last state (detached) to carry on from.

        batch: actions [B, T, A] leading into each frame, first [B, T], observed [B, T], and either embeddings [B, T, E] (frozen code)
        or low [B, T, P] with images name -> uint8 [B, T, 64, 64, 3].
        """
        if "embeddings" in batch:
            embeddings = batch["embeddings"]
        else:
            flat = {view: image.flatten(0, 1) for view, image in batch["images"].items()}
            embeddings = self.embed(batch["low"].flatten(0, 1), flat).unflatten(0, batch["low"].shape[:2])
        seen = self._disturb(embeddings, generator) if self.config.latent == "residual" else embeddings
        states, priors, posteriors = self.rssm.unroll(state, batch["actions"], seen, batch["first"], batch["observed"], generator)
        if self.config.latent == "residual":
            parts = self._prediction_loss(priors, embeddings, ~batch["first"])
        else:
            parts = self._evidence_loss(states, priors, posteriors, embeddings, batch)
        total = torch.stack(list(parts.values())).sum()
        return total, {name: value.item() for name, value in parts.items()}, states[:, -1].detach()

    def _disturb(self, embeddings: Tensor, generator: RandomSource) -> Tensor:
        """Embeddings with noise on the codes, so that the dynamics do not hang on what only one recorded scene shows."""
        noise = normal_like(embeddings, generator) * self.config.code_noise
        noise[..., : self.low_mean.shape[0]] = 0
        return embeddings + noise

    def _prediction_loss(self, priors: Tensor, embeddings: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Error of every predicted frame, one step ahead where observed and open loop elsewhere."""
        latent = self.rssm.latent
        code_weight = 1 + self.config.state_weight * self.two_peaked
        weight = torch.cat([torch.full_like(self.low_mean, self.config.proprio_weight), code_weight])
        error = F.smooth_l1_loss(latent.mean(priors), embeddings, reduction="none", beta=self.config.huber_width)
        if latent.stochastic:  # the scale is learned beside the mean, not in its place
            log_std = priors[..., latent.size :]
            surprise = (log_std + 0.5 * ((latent.mean(priors).detach() - embeddings) / log_std.exp()).square()) * 0.01
            error = error + surprise
        per_frame = (error * weight).sum(-1) / weight.sum()
        valid = valid.float()
        return {"prediction": (per_frame * valid).sum() / valid.sum()}

    def _evidence_loss(self, states: State, priors: Tensor, posteriors: Tensor, embeddings: Tensor, batch: dict) -> dict[str, Tensor]:
        """The paper's ELBO: pixels (or the code) and a balanced KL; optional proprio head."""
        config = self.config
        seen = batch["observed"].float()
        kl = self.rssm.latent.divergence(posteriors, priors, config.kl_balance)
        parts = {"kl": config.kl_scale * (kl * seen).sum() / seen.sum().clamp_min(1)}
        if config.vision == "code":
            error = (self.decode_embedding(states) - embeddings).square()
            low = self.low_mean.shape[0]
            weighted = config.proprio_weight * error[..., :low].sum(-1) + error[..., low:].sum(-1)
            parts["reconstruction"] = config.reconstruction_scale * weighted.mean()
            return parts
        flat = State(states.h.flatten(0, 1), states.z.flatten(0, 1))
        for view, image in self.decode_images(flat).items():
            target = to_float(batch["images"][view].flatten(0, 1))
            parts[f"pixels_{view}"] = config.reconstruction_scale * (image.float() - target).square().flatten(1).sum(-1).mean()
        if config.proprio_weight:
            normalised = self.command.standardise(to_lag(batch["low"]))
            predicted = self.low_decoder(states.feature)
            parts["proprio"] = config.proprio_weight * (predicted - normalised).square().sum(-1).mean()
        return parts

    def __repr__(self) -> str:
        count = {name: sum(p.numel() for p in module.parameters()) for name, module in self.named_children()}
        lines = [f"  {name}: {n / 1e6:.2f} M" for name, n in count.items() if n]
        total = f"{sum(count.values()) / 1e6:.2f} M parameters"
        return "\n".join([f"WorldModel {self.config.name}: {total}, feature {self.feature_size}", *lines])
