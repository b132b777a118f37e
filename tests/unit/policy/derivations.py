"""The mathematics of ``policy/`` a second time: NumPy float64, written from the papers, with nothing of the project.

Where a formula has several equal forms, this file takes another one than the code: the drift of the flow SDE comes
from the score, CPS from its angle, the alpha blend from an explicit quadratic in the background, rotary positions
from their integers.

Notation: x latent, v velocity, σ noise level, x̂₀ = x − σv the clean end, x̂₁ = x + (1 − σ)v the noise end.
"""

import itertools
import math

import numpy as np

# Published inputs and outputs of the kernels (research/peers.md, end of §2). The table's header with the inputs is
# lost; solving two of its rows for (x, v) gives these round numbers, and the other four rows agree with them. Only
# the mean square of ε enters its log-probabilities, and that is 0.5975. Its means are cut after seven places.
PEERS_X = np.array([0.5, -1.0, 0.25, 2.0])
PEERS_V = np.array([1.0, -0.5, 0.0, 0.75])
PEERS_EPSILON = np.array([1.5, -0.3, 0.2, 0.1])
PEERS_ROWS = (
    # kernel, η, σ, σ′, σ*, mean, noise scale, log-probability
    ("flow_sde", 0.7, 0.75, 0.5, 0.75, (0.06625, -0.599375, 0.18875, 1.2765625), 0.606217782649107,
     -0.7171725530400498),
    ("flow_sde", 0.7, 1.0, 0.75, 0.75, (0.1275, -0.63, 0.18875, 1.3225), 0.7, -0.8610135892659402),
    ("flow_sde", 0.7, 0.25, 0.0, 0.25, (0.1479167, -0.7627083, 0.2295833, 1.6032292), 0.202072594216369,
     0.38143973562806005),
    ("cps", 0.8, 0.75, 0.5, None, (-0.0091186, -0.4863221, 0.1636271, 1.0567373), 0.475528258147577,
     -0.13511095676737886),
    ("cps", 0.8, 1.0, 0.75, None, (-0.0091186, -0.3567627, 0.1204406, 0.7760255), 0.713292387221365,
     -0.30399965272660245),
    ("dance", 0.3, 0.75, 0.5, None, (0.23875, -0.858125, 0.24625, 1.7796875), 0.15, 0.6794314516812088),
)  # fmt: skip


def euler(x, v, sigma, sigma_next):
    """Step of the probability-flow ODE: along the straight line from x̂₁ to x̂₀."""
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * clean + sigma_next * noise


def flow_sde(x, v, sigma, sigma_next, sigma_star, eta):
    """Flow-GRPO, arXiv 2505.05470: dx = (v − ½s²·∇log p)dt + s dw with ∇log p = −x̂₁/σ and s = η√(σ/(1−σ*))."""
    s = eta * math.sqrt(sigma / (1 - sigma_star))
    return _score_step(x, v, sigma, sigma_next, s)


def dance(x, v, sigma, sigma_next, eta):
    """DanceGRPO, arXiv 2505.07818: mean x + v·dt + ½η²·(x − (1−σ)x̂₀)/σ²·dt, noise η√−dt."""
    dt = sigma_next - sigma
    clean = x - sigma * v
    return x + v * dt + 0.5 * eta**2 * (x - (1 - sigma) * clean) / sigma**2 * dt, eta * math.sqrt(-dt)


def cps(x, v, sigma, sigma_next, eta):
    """FlowCPS, arXiv 2509.05952: of the next noise σ′ the share cos θ is kept and sin θ is fresh, θ = ηπ/2."""
    angle = eta * math.pi / 2
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * clean + sigma_next * math.cos(angle) * noise, sigma_next * math.sin(angle)


def kernel_step(name, x, v, sigma, sigma_next, sigma_star, eta):
    """(mean, noise scale) of the named kernel."""
    if name == "flow_sde":
        return flow_sde(x, v, sigma, sigma_next, sigma_star, eta)
    return {"dance": dance, "cps": cps}[name](x, v, sigma, sigma_next, eta)


def log_prob(name, x_next, mean, scale, density="published"):
    """Mean over dimensions of one sample: a normal density, for CPS as published the bare negative square."""
    if name == "cps" and density == "published":
        return -float(np.mean((x_next - mean) ** 2))
    variance = scale**2
    return float(np.mean(-0.5 * (np.log(2 * math.pi * variance) + (x_next - mean) ** 2 / variance)))


def _score_step(x, v, sigma, sigma_next, s):
    dt = sigma_next - sigma
    score = -(x + (1 - sigma) * v) / sigma
    return x + (v - 0.5 * s**2 * score) * dt, s * math.sqrt(-dt)


def standard_kl(mean, other, scale):
    """KL(p ‖ q) = E[log p − log q] per dimension: of two normals of one scale log p − log q is linear in x, so its
    expectation is its value at the mean of p."""
    return log_prob("normal", mean, mean, scale) - log_prob("normal", mean, other, scale)


def guarded(advantage, log_ratio, mean, old_mean, scale, dt, clip_range):
    """GRPO-Guard, arXiv 2510.22319: (ratio, loss) of one sample of a step with noise scale c = s√−dt.

    RatioNorm: r = exp((Δlog p + mean (Δμ)²/2c²)·c). The gradient of the clipped loss is weighed by 1/√−dt².
    """
    ratio = math.exp(scale * log_ratio + float(np.mean((mean - old_mean) ** 2)) / (2 * scale))
    bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
    return ratio, max(-advantage * ratio, -advantage * bounded) / math.sqrt(-dt) ** 2


def nft_divisors(clean, noise, time, v, v_old, beta):
    """What DiffusionNFT divides the two squared errors of one sample by, without gradient."""
    return [max(float(np.mean(np.abs(error))), 1e-5) for error in _nft_errors(clean, noise, time, v, v_old, beta)]


def nft(clean, noise, time, v, v_old, advantage, beta, advantage_max, divisors=None):
    """DiffusionNFT, arXiv 2509.16117: (L⁺, L⁻, loss) of one sample."""
    divisors = nft_divisors(clean, noise, time, v, v_old, beta) if divisors is None else divisors
    errors = _nft_errors(clean, noise, time, v, v_old, beta)
    positive, negative = (float(np.mean(e**2)) / d for e, d in zip(errors, divisors, strict=True))
    optimality = (1 + min(max(advantage / advantage_max, -1), 1)) / 2
    return positive, negative, advantage_max * (optimality * positive + (1 - optimality) * negative) / beta


def _nft_errors(clean, noise, time, v, v_old, beta):
    """x̂₀ − x₀ of both implicit policies, v_old ± β(v − v_old): what each misses of the direction ε − x₀, times t."""
    return [time * (noise - clean - (v_old + sign * beta * (v - v_old))) for sign in (1, -1)]


def dpm(x, clean, previous, before, sigma, sigma_next):
    """DPM-Solver++(2M), Algorithm 2 of arXiv 2211.01095 at α = 1 − σ: x′ = (σ′/σ)x − α′(e^−h − 1)D with
    D = (1 + 1/2r)·x̂₀ − (1/2r)·previous, h = λ′ − λ, r = (λ − λ_before)/h, λ = log(α/σ). First order has D = x̂₀."""
    with np.errstate(divide="ignore"):
        last, now, then = (np.log(1 - s) - np.log(s) for s in (before or sigma, sigma, sigma_next))
    direction = clean
    if previous is not None and sigma_next > 0:
        r = (now - last) / (then - now)  # infinite after a step from σ = 1
        direction = (1 + 1 / (2 * r)) * clean - previous / (2 * r)
    return sigma_next / sigma * x - (1 - sigma_next) * np.expm1(now - then) * direction


def dpm_run(velocity, x, sigmas):
    """DPM-Solver++(2M) over noise levels, from a state without history."""
    previous, before = None, None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        clean = x - sigma * velocity(x, sigma)
        x, previous, before = dpm(x, clean, previous, before, sigma, sigma_next), clean, sigma
    return x


def gaussian_velocity(x, sigma, mean, spread):
    """E[ε − x₀ | x] for data N(mean, spread²): its ODE takes the noise z at σ = 1 to mean + spread·z at σ = 0."""
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    return (sigma - (1 - sigma) * spread**2) / variance * (x - (1 - sigma) * mean) - mean


def shifted(u, shift):
    """Time shift in the form of the Qwen-Image schedulers: e^μ / (e^μ + 1/u − 1) with μ = ln k; 0 stays 0."""
    return 0.0 if u == 0 else shift / (shift + 1 / u - 1)


def clipped(advantage, log_ratio, clip_range):
    """Loss of one element and whether its gradient is gone, case by case."""
    ratio = math.exp(log_ratio)
    if advantage > 0 and ratio > 1 + clip_range:
        return -advantage * (1 + clip_range), True
    if advantage < 0 and ratio < 1 - clip_range:
        return -advantage * (1 - clip_range), True
    return -advantage * ratio, False


def blend(rgba, background):
    """Straight RGBA (4, …), all four in [−1, 1], over one background value per channel (3,)."""
    alpha = (rgba[3] + 1) / 2
    return np.stack([alpha * rgba[c] + (1 - alpha) * background[c] for c in range(3)])


def expected_blend_mse(output, target, mean, mean_square):
    """E_b‖blend(output, b) − blend(target, b)‖² per element, from E[b] and E[b²] alone.

    The difference of the blends is linear in b: c₀ + c₁b. Its expected square is c₀² + 2c₀c₁E[b] + c₁²E[b²].
    """
    constant = blend(output, np.zeros(3)) - blend(target, np.zeros(3))
    slope = blend(output, np.ones(3)) - blend(target, np.ones(3)) - constant
    m, q = np.reshape(mean, (3, 1, 1)), np.reshape(mean_square, (3, 1, 1))
    return float(np.mean(constant**2 + 2 * constant * slope * m + slope**2 * q))


def two_point_blend_mse(output, target, mean, mean_square):
    """The same by brute force: b = m ± √(q − m²), each half of the time, has mean m and mean square q."""
    m, spread = np.array(mean), np.sqrt(np.array(mean_square) - np.array(mean) ** 2)
    errors = [np.mean((blend(output, b) - blend(target, b)) ** 2) for b in (m + spread, m - spread)]
    return float(np.mean(errors))


def pack(latent):
    """(C, H, W) → (H/2·W/2, 4C), one token after the other: rows of 2×2 patches, channel before place in the patch."""
    channels, height, width = latent.shape
    return np.array(
        [
            [latent[c, 2 * i + a, 2 * j + b] for c in range(channels) for a in range(2) for b in range(2)]
            for i in range(height // 2)
            for j in range(width // 2)
        ]
    )


def image_positions(images, height, width):
    """(layer, row, column) of every image token, in patches: layers count from 0, rows and columns are centred."""
    return [
        (layer, row - (height - height // 2), column - (width - width // 2))
        for layer in range(images)
        for row in range(height)
        for column in range(width)
    ]


def text_positions(tokens, height, width):
    """Text starts at max(h//2, w//2) on all three axes at once."""
    start = max(height // 2, width // 2)
    return [(start + k,) * 3 for k in range(tokens)]


def rotations(positions, axes, theta=10000.0):
    """Complex rotary factors (tokens, Σ axes / 2) of integer positions."""
    rows = []
    for position in positions:
        angles = [
            place * theta ** (-2 * k / axis)
            for place, axis in zip(position, axes, strict=True)
            for k in range(axis // 2)
        ]
        rows.append(np.exp(1j * np.array(angles)))
    return np.array(rows)
