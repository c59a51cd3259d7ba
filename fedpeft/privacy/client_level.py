"""Privacy of whole clients: the server clips their updates and adds the noise.

One epsilon protects everything that one client ever sent, from all who see models and
reports; not from the server itself. :class:`PrivateMean` is an aggregator like any
other, so a server optimiser may wrap it: that is post-processing.

>>> split_noise(noise_multiplier=3.0, count_noise=2.5)
3.75
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fedpeft.interfaces import Aggregator, State, Update
from fedpeft.privacy.banded import Banded, Drawn
from fedpeft.privacy.randomness import Randomness, noised
from fedpeft.tensors import (
    Tensors,
    flatten,
    unflatten,
    with_prefix,
    without_prefix,
)

NORM_RANGE = 1000.0
"""An adaptive norm stays within the first one over and times this: public bounds."""

# Share of the norm kept free for rounding. Adding in float64 errs by at most 2^-53 of
# each partial sum: with n updates, by less than n^2 2^-53 norms in two neighbouring
# sums together, which is below this share for up to 90,000 updates a round.
_RESERVE = 1e-6


@dataclass(frozen=True)
class AdaptiveNorm:
    """A clipping norm that follows a quantile of the updates' own norms.

    **Guarantees**: a round's norm is a function of public constants and of the noised
    counts of the rounds before, so it may be published. What the counts cost is taken
    from the noise that the plan has, see :func:`split_noise`.

    Source: Andrew, Thakkar, McMahan & Ramaswamy (2021), algorithm 1,
    https://arxiv.org/abs/1905.03871.

    Attributes:
        quantile: share of the updates that should be within the norm, in (0, 1).
        learning_rate: of the norm's logarithm, a round.
        count_noise: standard deviation of the noise on the count of updates within the
            norm, in clients.
    """

    quantile: float
    learning_rate: float
    count_noise: float

    def __post_init__(self) -> None:
        rate, noise = self.learning_rate, self.count_noise
        _check(0 < self.quantile < 1, "0 < quantile < 1", self.quantile)
        _check(0 < rate < math.inf, "a finite learning_rate > 0", rate)
        _check(0 <= noise < math.inf, "a finite count_noise >= 0", noise)

    def following(self, norm: float, share: float, first: float) -> float:
        """Returns the next round's norm.

        Args:
            norm: of this round.
            share: of the updates that were within it, noised; may leave [0, 1].
            first: of the first round; :data:`NORM_RANGE` bounds the distance from it.
        """
        moved = math.log(norm / first) - self.learning_rate * (share - self.quantile)
        bound = math.log(NORM_RANGE)
        return first * math.exp(min(max(moved, -bound), bound))


def split_noise(noise_multiplier: float, count_noise: float) -> float:
    """Returns the updates' own noise multiplier where their count is released too.

    ``(z^-2 - (2 count_noise)^-2)^(-1/2)``. A client moves the updates' sum by one norm
    and the count by 1/2 (see :class:`PrivateMean`). Both releases together are one
    Gaussian mechanism whose squared sensitivity, in units of the noise, is the sum of
    theirs: exactly that of one release of `noise_multiplier`, drawn cohorts included.

    Source: Andrew et al. (2021), theorem 1, https://arxiv.org/abs/1905.03871.

    Args:
        noise_multiplier: z, of the whole release; 0 is one without privacy.
        count_noise: standard deviation of the noise on the count, in clients.

    Raises:
        ValueError: if the count alone would cost as much as the whole release may.
    """
    if noise_multiplier == 0:
        return 0.0
    if count_noise <= noise_multiplier / 2:
        raise ValueError(
            f"Expected count_noise > noise_multiplier / 2 = {noise_multiplier / 2:g}, "
            f"got {count_noise:g}: the count alone would cost all that the noise "
            "allows; raise count_noise."
        )
    return noise_multiplier / math.sqrt(1 - (noise_multiplier / (2 * count_noise)) ** 2)


@dataclass(frozen=True)
class PrivateMean(Aggregator):
    """Clips each update, sums, adds noise, divides by a public number.

    **Guarantees**: adding or removing one client's update changes the sum by at most
    the clipping norm in L2, over all tensors together as one vector, rounding of the
    sum included for up to 90,000 updates. The fresh noise on every coordinate of the
    sum has standard deviation ``update_noise_multiplier * clipping_norm`` (or a little
    more, with `banded`), and the noised sum lies on the grid of
    :func:`~fedpeft.privacy.randomness.noised`. All updates weigh the same:
    ``num_examples`` is never looked at. The divisor is `nominal_cohort`, however many
    answered. An update that is not finite counts as none, alone. A round without
    updates is a valid round: it releases noise. The stream is consumed once; beside its
    results, one float64 sum and one update are held, however many clients there are.

    With `adaptive`, the count of updates within the norm is released as well: as the
    sum of 1/2 for each within and -1/2 for each beyond it, so that one client moves it
    by 1/2. Both together are one Gaussian release of `noise_multiplier`; the updates'
    own share of it is :attr:`update_noise_multiplier`. With `banded`, the sums' noise
    is correlated over the rounds, and a client's rounds must lie ``banded.bands``
    apart. The two go together: a sum in units of its own round's norm has sensitivity
    1, that norm is public when the round begins, and the counts' noise is fresh.

    **Not guaranteed**: anything against the server, which sees every update and knows
    the noise; its state may hold past noise (see ``Banded``). That noise is added at
    all: a client cannot verify it. How cohorts are drawn and how often a client takes
    part, which the accountant must be told.

    Source: McMahan et al. (2018), https://arxiv.org/abs/1710.06963, with the noise's
    scale and the divisor fixed beforehand; Andrew et al. (2021), algorithm 1.

    Attributes:
        clipping_norm: L2 bound of one update; the first one if it adapts. Infinity is
            for runs without noise.
        noise_multiplier: unitless; of the whole release.
        nominal_cohort: the divisor, a public constant: the mean size of a Poisson
            cohort, the size of one in a rotation.
        randomness: where a round's noise comes from, by ``server_round`` from 1; a
            seeded source must not serve two rounds.
        adaptive: None keeps the norm.
        banded: None draws each round's noise on its own.

    Example:
        >>> from fedpeft.privacy.randomness import SecureRandomness
        >>> rule = PrivateMean(5.0, 0.0, 2.0, lambda server_round: SecureRandomness())
        >>> updates = [Update({"w": torch.tensor([30.0, 40.0])}) for _ in range(2)]
        >>> step, state = rule.aggregate(updates, rule.init({"w": torch.zeros(2)}))
        >>> step["w"].round(decimals=4)
        tensor([3., 4.])
    """

    clipping_norm: float
    noise_multiplier: float
    nominal_cohort: float
    randomness: Callable[[int], Randomness]
    adaptive: AdaptiveNorm | None = None
    banded: Banded | None = None

    def __post_init__(self) -> None:
        norm, multiplier = self.clipping_norm, self.noise_multiplier
        cohort = self.nominal_cohort
        _check(0 <= multiplier < math.inf, "a finite noise_multiplier >= 0", multiplier)
        _check(0 < cohort < math.inf, "a finite nominal_cohort > 0", cohort)
        _check(norm > 0, "clipping_norm > 0", norm)
        if multiplier > 0 or self.adaptive is not None:
            _check(norm < math.inf, "a finite clipping_norm", norm)
        if self.adaptive is not None:
            split_noise(multiplier, self.adaptive.count_noise)

    @property
    def update_noise_multiplier(self) -> float:
        """The noise multiplier of the updates' sum: what the count leaves of it."""
        if self.adaptive is None:
            return self.noise_multiplier
        return split_noise(self.noise_multiplier, self.adaptive.count_noise)

    def current_norm(self, state: State) -> float:
        """Returns the clipping norm of the round after `state`; it is public."""
        if self.adaptive is None:
            return self.clipping_norm
        return float(state["clipping_norm"])

    def init(self, like: Tensors) -> State:
        """Returns the state before the first round, with the shapes of `like`.

        A round without updates must know them; tensors of no values carry them.
        """
        template = {name: t.new_empty((0, *t.shape)) for name, t in like.items()}
        state = with_prefix("template", template)
        state["server_round"] = torch.tensor(0)
        if self.adaptive is not None:
            first = torch.tensor(self.clipping_norm, dtype=torch.float64)
            state["clipping_norm"] = first
        if self.banded is not None:
            size = sum(tensor.numel() for tensor in like.values())
            state |= with_prefix("banded", self.banded.init(size))
        return state

    def aggregate(
        self, updates: Iterable[Update], state: State
    ) -> tuple[Tensors, State]:
        """Returns the noised sum over `nominal_cohort`, and the next state.

        An empty stream gives noise alone.

        Raises:
            ValueError: if an update's names or shapes are not those of the template, or
                the round is beyond those that `banded` was planned for.
        """
        like, norm = _template(state), self.current_norm(state)
        server_round = int(state["server_round"]) + 1
        source = self.randomness(server_round)
        total, balance = _clipped_sum(updates, like, norm)
        noise, history = self._noise(source, server_round, total.numel(), state)
        multiplier = self.update_noise_multiplier
        # Without noise the norm may be infinite.
        released = noised(total, multiplier * norm if multiplier else 0.0, noise)
        adapted = self._adapted(norm, balance, source)
        parts = unflatten(released / self.nominal_cohort, like)
        step = {name: part.to(like[name].dtype) for name, part in parts.items()}
        done = {"server_round": torch.tensor(server_round)}
        return step, state | done | history | adapted

    def _noise(
        self, source: Randomness, server_round: int, size: int, state: State
    ) -> tuple[Randomness, State]:
        """Returns where the sum's noise comes from, and what is new in the state."""
        if self.banded is None:
            return source, {}
        history = without_prefix("banded", state)
        fresh = source.gaussian(size)
        noise, history = self.banded.correlate(fresh, server_round, history)
        return Drawn(noise), with_prefix("banded", history)

    def _adapted(self, norm: float, balance: float, source: Randomness) -> State:
        """Returns what the count, noised, makes of the norm."""
        if self.adaptive is None:
            return {}
        count = torch.tensor([balance], dtype=torch.float64)
        counted = noised(count, self.adaptive.count_noise, source).item()
        share = counted / self.nominal_cohort + 0.5
        following = self.adaptive.following(norm, share, self.clipping_norm)
        return {"clipping_norm": torch.tensor(following, dtype=torch.float64)}


def _template(state: State) -> Tensors:
    """The server's tensors without values, in order of name whatever the state's is.

    The order decides which coordinate gets which noise.
    """
    kept = without_prefix("template", state)
    return {
        name: torch.empty(kept[name].shape[1:], dtype=kept[name].dtype, device="meta")
        for name in sorted(kept)
    }


def _clipped_sum(
    updates: Iterable[Update], like: Tensors, norm: float
) -> tuple[torch.Tensor, float]:
    """Returns the clipped updates' sum, and 1/2 for each within the norm or -1/2."""
    size = sum(tensor.numel() for tensor in like.values())
    total, balance = torch.zeros(size, dtype=torch.float64), 0.0
    bound = norm * (1 - _RESERVE)
    for update in updates:
        vector = _vector(update.tensors, like)
        # Else it would live on while the stream decodes the next one.
        del update
        length = float(torch.linalg.vector_norm(vector))
        if not math.isfinite(length):
            continue
        total.add_(vector, alpha=bound / length if length > bound else 1.0)
        balance += 0.5 if length <= norm else -0.5
    return total, balance


def _vector(tensors: Tensors, like: Tensors) -> torch.Tensor:
    """Returns an update as one float64 vector in the order of `like`."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in like.items()}:
        raise ValueError(
            "Expected updates with the same names and shapes as the server's state, "
            "got another: all clients of a run must train the same method."
        )
    return flatten({name: tensors[name] for name in like}).to(torch.float64)


def _check(holds: bool, expected: str, value: float) -> None:
    if not holds:
        raise ValueError(f"Expected {expected}, got {value}.")
