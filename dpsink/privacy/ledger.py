"""The privacy budget of a study: what all of its trials together, or the selection among them, cost.

Picking the best of many private trials is itself a release. Three policies say what is claimed for it:

`compose_all`: everything may be published. A trial's worst case is reserved before it starts, by a privacy
filter: the sum of the trials' Rényi divergences at one order, chosen before the first trial, stays below a
cap (Feldman & Zrnic 2021, "Individual privacy accounting via a Rényi filter"; for trials that run at once
Haney et al. 2023, "Concurrent composition for interactive differential privacy with adaptive privacy-loss
parameters"). Costs that are all fixed in advance are composed by PLD instead, which is tighter (Zhu, Dong &
Wang 2022, "Optimal accounting of differential privacy via characteristic function").

`release_best`: only the winner of a secret, random number of trials is published (Papernot & Steinke 2022,
"Hyperparameter tuning with Rényi differential privacy").

`per_trial_only`: no claim is made for the study.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from dpsink.errors import InputError
from dpsink.privacy.accounting import accountant_version, epsilon
from dpsink.privacy.questions import Mechanism
from dpsink.privacy.storage import GENESIS, Chain, Storage, as_storage

Policy = Literal["compose_all", "release_best", "per_trial_only"]
Guarantee = Literal["filter", "fixed_costs", "selection", "none"]

# Rényi orders among which one is chosen: close to 1 for ε in the hundreds, large for ε of a few hundredths.
ORDERS = (
    *(1.01, 1.02, 1.05),
    *(1 + tenths / 10 for tenths in range(1, 100)),
    *(float(order) for order in (*range(11, 65), 80, 96, 128, 192, 256, 512, 1024)),
)
FEW = 8  # different mechanisms: to compose more takes a second and longer
_ROUNDING = 1e-9  # relative slack, on the safe side, against the rounding of sums


class BudgetExhausted(RuntimeError):
    """A trial that may not start: its worst case does not fit into what the study has left."""


@dataclass(frozen=True)
class TrialCost:
    """What a trial costs at worst: so many steps of the Poisson-subsampled Gaussian mechanism.

    A single release without sampling, such as the class-mean control, is one step at a sample rate of 1.

    Args:
        sample_rate: q in [0, 1].
        noise_multiplier: noise standard deviation over sensitivity (σ), >= 0; 0 is without privacy.
        steps: at most this many steps, >= 0.

    Raises:
        InputError: a value is outside its range.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _require(0 <= self.sample_rate <= 1, "sample_rate", self.sample_rate, "in [0, 1]")
        _require(0 <= self.noise_multiplier < math.inf, "noise_multiplier", self.noise_multiplier, "in [0, inf)")
        _require(self.steps >= 0, "steps", self.steps, ">= 0")

    def rdp(self, orders: tuple[float, ...] = ORDERS) -> np.ndarray:
        """Rényi divergence of all steps at each order: [len(orders)], in nats."""
        if self.steps == 0:
            return np.zeros(len(orders))  # also without noise, where one step is infinite
        from dpsink.privacy.bounds import rdp_curve  # takes seconds, and who only trains needs none of it

        return self.steps * rdp_curve(Mechanism(self.sample_rate, self.noise_multiplier), orders)


@dataclass(frozen=True)
class Selection:
    """How the number K >= 1 of trials of `release_best` is drawn (Papernot & Steinke 2022, definition 1).

    Args:
        expected_trials: E[K] in (1, 1e9). K itself may be several times larger.
        shape: `logarithmic` (η = 0, cheapest) or `geometric` (η = 1, less spread) of the truncated negative
            binomial distributions.

    Raises:
        InputError: a value is outside its range.
    """

    expected_trials: float
    shape: Literal["logarithmic", "geometric"] = "logarithmic"

    def __post_init__(self) -> None:
        _require(self.shape in ("logarithmic", "geometric"), "shape", self.shape, "logarithmic or geometric")
        _require(1 < self.expected_trials < 1e9, "expected_trials", self.expected_trials, "in (1, 1e9)")

    @property
    def gamma(self) -> float:
        """The distribution's parameter γ in (0, 1)."""
        if self.shape == "geometric":
            return 1 / self.expected_trials
        return _logarithmic_gamma(self.expected_trials)

    def draw(self) -> int:
        """K, from the operating system's entropy."""
        generator = np.random.default_rng(secrets.randbits(128))
        if self.shape == "geometric":
            return int(generator.geometric(self.gamma))
        return int(generator.logseries(1 - self.gamma))

    def quantile(self, part: float) -> int:
        """The number that K exceeds in 1 - `part` of the cases at most; `part` in (0, 1)."""
        from scipy.stats import geom, logser  # it takes a second

        law = geom(self.gamma) if self.shape == "geometric" else logser(1 - self.gamma)
        return int(law.ppf(part))

    def rdp(self, base: np.ndarray) -> np.ndarray:
        """Rényi divergence of publishing the best of K runs (Papernot & Steinke 2022, theorem 2).

        Args:
            base: divergence of one run at `ORDERS`: [len(ORDERS)].

        Returns:
            The same for the selection: [len(ORDERS)].
        """
        eta, orders = {"logarithmic": 0, "geometric": 1}[self.shape], np.array(ORDERS)
        gamma = self.gamma * (1 - _ROUNDING)  # smaller is the safe side
        selecting = (1 + eta) * np.min((1 - 1 / orders) * base - math.log(gamma) / orders)
        return base + selecting + math.log(self.expected_trials) / (orders - 1)


@dataclass(frozen=True)
class StudyPlan:
    """What is promised before the first trial starts.

    Args:
        guarantee: what kind of claim it is.
        epsilon: the study's ε; infinite for no privacy, None for no claim.
        order: the Rényi order of the filter, or the one that is best for the selection.
        rdp_cap: what the filter lets the divergences at `order` sum up to.
    """

    guarantee: Guarantee
    epsilon: float | None
    order: float | None = None
    rdp_cap: float | None = None


def plan_study(
    costs: Sequence[TrialCost],
    delta: float,
    *,
    policy: Policy = "compose_all",
    study_epsilon: float | None = None,
    adaptive: bool = True,
    selection: Selection | None = None,
) -> StudyPlan:
    """What a study of trials with these worst cases can promise.

    Args:
        costs: `compose_all`: one for each planned trial, may be empty if `study_epsilon` is given.
            `release_best`: one for each cost that a trial may have.
        delta: δ of the study, in (0, 1).
        policy: see the module.
        study_epsilon: the most that the study may spend; by default what `costs` need. `compose_all` only, but
            infinity makes a study of any policy one without privacy.
        adaptive: whether a trial may cost something else than what is listed for it. With False the list is
            fixed in advance and composed by PLD; all other hyperparameters may still be adaptive.
        selection: how many trials `release_best` runs.

    Raises:
        InputError: a value is outside its range, or does not go with the policy.
    """
    _check_options(costs, delta, policy, study_epsilon, selection)
    if study_epsilon == math.inf:
        return StudyPlan("none", math.inf)
    if policy == "per_trial_only":
        return StudyPlan("none", None)
    if selection:
        return _plan_selection(costs, delta, selection)
    if any(cost.noise_multiplier == 0 for cost in costs):
        return _plan_without_privacy(study_epsilon)
    if costs and not adaptive:
        composed = composed_epsilon(costs, delta)
        if composed <= (study_epsilon or math.inf):
            return StudyPlan("fixed_costs", composed)
    return _plan_filter(costs, delta, study_epsilon)


def planned_epsilon(costs: Sequence[TrialCost], delta: float, **options: Any) -> float | None:
    """The worst-case ε of a study; infinite without privacy, None where nothing is claimed.

    Arguments and errors are those of `plan_study`. It is the default of `study_epsilon`.
    """
    return plan_study(costs, delta, **options).epsilon


def composed_epsilon(costs: Iterable[TrialCost], delta: float) -> float:
    """ε of publishing every trial of a list whose costs are fixed in advance, composed by PLD.

    The order of the trials, whether they run at the same time, and where each stops may depend on results:
    a run that stops early publishes less than the full run (for concurrency Vadhan & Zhang 2023, "Concurrent
    composition theorems for differential privacy").
    """
    kinds = _mechanisms(costs)
    if any(kind.noise_multiplier == 0 for kind in kinds):
        return math.inf
    if len(kinds) == 1:
        return epsilon(**asdict(kinds[0]), delta=delta)
    return _mixed_epsilon(tuple(kinds), delta) if kinds else 0.0


def _mechanisms(costs: Iterable[TrialCost]) -> list[TrialCost]:
    """The different mechanisms that are paid for, each with all its steps."""
    steps: Counter[tuple[float, float]] = Counter()  # by (sample rate, noise multiplier)
    for cost in costs:
        steps[cost.sample_rate, cost.noise_multiplier] += cost.steps
    return sorted((TrialCost(*kind, total) for kind, total in steps.items() if total and kind[0]), key=astuple)


@lru_cache(maxsize=256)  # a composition takes a second, and a study asks again whenever a trial has ended
def _mixed_epsilon(kinds: tuple[TrialCost, ...], delta: float) -> float:
    """ε of different mechanisms by PLD, and never more than by RDP."""
    from dpsink.privacy.bounds import mixed_pld_epsilon

    parts = [(Mechanism(kind.sample_rate, kind.noise_multiplier), kind.steps) for kind in kinds]
    return min(_rdp_epsilon(kinds, delta), mixed_pld_epsilon(parts, delta))


def _rdp_epsilon(costs: Iterable[TrialCost], delta: float) -> float:
    """ε of all costs together at the order that is best for them."""
    total = sum((cost.rdp() for cost in costs), np.zeros(len(ORDERS)))
    return max(0.0, float((total + _conversion(delta)).min()))


def _check_options(
    costs: Sequence[TrialCost],
    delta: float,
    policy: Policy,
    study_epsilon: float | None,
    selection: Selection | None,
) -> None:
    _require(policy in get_args(Policy), "policy", policy, f"one of {', '.join(get_args(Policy))}")
    _require(0 < delta < 1, "delta", delta, "in (0, 1)")
    rule = "given with policy release_best and only then"
    _require((selection is not None) == (policy == "release_best"), "selection", selection, rule)
    if study_epsilon not in (None, math.inf):
        _require(policy == "compose_all", "study_epsilon", study_epsilon, "left out unless policy is compose_all")
        _require(study_epsilon > 0, "study_epsilon", study_epsilon, "> 0")
    if not costs and policy != "per_trial_only" and (study_epsilon is None or selection):
        raise InputError("planned=[] must name the trials' costs, or study_epsilon be given: add one of them")


def _plan_without_privacy(study_epsilon: float | None) -> StudyPlan:
    if study_epsilon is not None:
        raise InputError(
            f"study_epsilon={study_epsilon:g} cannot hold with a trial of noise_multiplier=0; leave that"
            " trial out, or set study_epsilon to inf: the study is then labelled NON-PRIVATE"
        )
    return StudyPlan("none", math.inf)


def _plan_selection(costs: Sequence[TrialCost], delta: float, selection: Selection) -> StudyPlan:
    total = selection.rdp(_envelope(costs)) + _conversion(delta)
    return StudyPlan("selection", max(0.0, float(total.min())), ORDERS[int(total.argmin())])


def _plan_filter(costs: Sequence[TrialCost], delta: float, study_epsilon: float | None) -> StudyPlan:
    """The filter at the order that admits the most of the plan (of any Gaussian-like trials without one)."""
    need = sum((cost.rdp() for cost in costs), np.zeros(len(ORDERS)))
    if study_epsilon is None:
        best = int((need + _conversion(delta)).argmin())
        cap = float(need[best]) * (1 + _ROUNDING)
        return StudyPlan("filter", max(0.0, cap + float(_conversion(delta)[best])), ORDERS[best], cap)
    caps = study_epsilon - _conversion(delta)
    best = int((caps / (need if need.all() else np.array(ORDERS))).argmax())
    _require(caps[best] > 0, "study_epsilon", study_epsilon, f"larger at delta={delta:g}")
    return StudyPlan("filter", study_epsilon, ORDERS[best], float(caps[best]))


def _envelope(costs: Iterable[TrialCost]) -> np.ndarray:
    """The pointwise maximum of the trials' RDP curves, at `ORDERS`."""
    return np.max([cost.rdp() for cost in costs], axis=0)


def _conversion(delta: float) -> np.ndarray:
    """What turns a divergence at each of `ORDERS` into ε (Canonne, Kamath & Steinke 2020, proposition 12)."""
    orders = np.array(ORDERS)
    return np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)


def _logarithmic_gamma(mean: float) -> float:
    """γ of the logarithmic distribution with that mean, (1/γ - 1) / ln(1/γ)."""
    from scipy.optimize import root_scalar

    solution = root_scalar(lambda gamma: (1 / gamma - 1) / -math.log(gamma) - mean, bracket=(1e-12, 1 - 1e-12))
    return float(solution.root)


def _require(holds: bool, field: str, value: object, rule: str) -> None:
    if not holds:
        raise InputError(f"{field}={value!r} must be {rule}; correct it in the study")


_CLAIMS: dict[Guarantee, str] = {
    "filter": "a privacy filter: at one Rényi order, chosen before the first trial, the divergences of all"
    " trials never add up to more; everything that the study makes may be published",
    "fixed_costs": "composition by PLD of trials whose costs were all fixed before the first; everything that"
    " the study makes may be published",
    "selection": "selection of one winner among a secret, random number of trials (Papernot & Steinke 2022);"
    " only the winner may be published",
    "none": "no guarantee is given for the study as a whole",
}
_ASSUMPTIONS = (
    "the number of records N, the sample rate, the noise multiplier and the set of labels are public",
    "every record joins every step independently, at the sample rate that is accounted",
    "the noise is Gaussian, scaled to the full sensitivity (2C for the mechanism `batch`, c for `record`)"
    " and independent from step to step; every step drawn is charged, replayed ones again",
    "trials are compared on public data, or by noisy scores that are accounted for",
    "the ledgers' storage keeps what was written to it",
)
_SELECTION_NOT_COVERED = "the selection: picking a trial by its results costs more than the trial's own epsilon"
_NOT_COVERED = (
    "replacing one record by another (replace-one adjacency)",
    "timing, which may reveal the sizes of batches and roughly how many trials ran",
    "the strength of the device's random generator",
    "floating-point output, which is not exactly Gaussian",
    "other studies and releases of the same records",
)


@dataclass(frozen=True)
class PrivacyStatement:
    """What may be said about a study's privacy, and under which conditions; goes with everything published.

    Args:
        policy: the ledger's policy.
        trial_epsilon, trial_delta: of one trial on its own; infinite without privacy.
        study_epsilon, study_delta: of all that the study publishes; infinite without privacy, None for no
            claim.
        guarantee: what kind of claim the study's is.
        order: the Rényi order that was fixed before the first trial, where the claim rests on one.
        spent: ε spent so far, an odometer reading and no claim.
        accountants: name and version of each.
        assumptions: what has to hold for the claims.
        not_covered: what the claims do not speak of.
        non_private: no privacy at all.
        adjacency: which data sets are hard to tell apart.
        accounts: where disjoint records are charged apart (`accounts.py`), name of an account to its `epsilon`,
            `guarantee`, `order` and `spent`; the study's ε is the largest. Empty where there is one account.
        earlier: the study whose results this one started from, in whose ε and δ it is contained: its name `study`, its
            `epsilon`, `delta` and `spent`. Empty where there is none.
    """

    policy: Policy
    trial_epsilon: float
    trial_delta: float
    study_epsilon: float | None
    study_delta: float
    guarantee: str
    order: float | None
    spent: float
    accountants: tuple[str, ...]
    assumptions: tuple[str, ...]
    not_covered: tuple[str, ...]
    non_private: bool
    adjacency: str = "adding or removing one record; the number of records N is public"
    accounts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    earlier: Mapping[str, Any] = field(default_factory=dict)

    def after(self, study: str, epsilon: float | None, delta: float, spent: float) -> PrivacyStatement:
        """The same of a study that was chosen by the results of another one on the same records: of both together.

        Basic composition, which holds whatever the second study took from the first (Dwork and Roth 2014,
        Theorem 3.16; each study is itself private for any input besides the records).

        Args:
            study: name of the earlier one.
            epsilon, delta: its claim; None is no claim, and then there is none for both.
            spent: its reading.
        """
        claims = self.study_epsilon, epsilon
        return replace(
            self,
            study_epsilon=None if None in claims else math.fsum(claim for claim in claims if claim is not None),
            study_delta=self.study_delta + delta,
            spent=self.spent + spent,
            non_private=self.non_private or epsilon == math.inf,
            earlier={"study": study, "epsilon": epsilon, "delta": delta, "spent": spent},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; infinity, which JSON lacks, is the string `inf`."""
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        fields["earlier"] = _finite(self.earlier)
        return _finite(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PrivacyStatement:
        """The inverse of `to_dict`."""

        def value(plain: Any) -> Any:
            if isinstance(plain, list | dict):
                return tuple(plain) if isinstance(plain, list) else {key: value(one) for key, one in plain.items()}
            return math.inf if plain == "inf" else plain

        return cls(**{field: value(plain) for field, plain in fields.items()})

    def text(self) -> str:
        """The statement for people, wrapped at 80 columns; every ε is rounded up."""
        order = f" (order {self.order:g})" if self.order else ""
        study = f"{_pair(self.study_epsilon, self.study_delta)}; {self.guarantee}{order}"
        paragraphs = [
            "NON-PRIVATE: no privacy guarantee holds." if self.non_private else "Privacy statement",
            f"Each trial on its own: {_pair(self.trial_epsilon, self.trial_delta)}.",
            f"The study, policy {self.policy}: {study}.",
            *self._earlier_line(),
            *self._account_lines(),
            f"Spent so far: epsilon {_rounded_up(self.spent)}; a reading, which is not a claim.",
            f"Adjacency: {self.adjacency}.",
            f"Accountants: {', '.join(self.accountants)}.",
            *_listed("Assumed:", self.assumptions),
            *_listed("Not covered:", self.not_covered),
        ]
        return "\n".join(textwrap.fill(p, 80, subsequent_indent="  ") for p in paragraphs) + "\n"

    def _earlier_line(self) -> list[str]:
        if not self.earlier:
            return []
        claim = _pair(self.earlier["epsilon"], self.earlier["delta"])
        return [f"In it, by basic composition: {claim} of the study {self.earlier['study']}, which chose these trials."]

    def _account_lines(self) -> list[str]:
        """The accounts of disjoint records, the larger first."""
        readings = sorted(
            self.accounts.items(), key=lambda account: (account[1]["epsilon"] or 0.0, account[1]["spent"]), reverse=True
        )
        lines = [
            f"{name} records: {_pair(one['epsilon'], self.study_delta)}; spent so far: {_rounded_up(one['spent'])}"
            for name, one in readings
        ]
        title = "Accounts of records that are never in both; the larger, named first, is the study's:"
        return _listed(title, lines) if lines else []


def trial_statement(trial_epsilon: float, delta: float) -> PrivacyStatement:
    """What may be said about one trial that belongs to no study: its own PLD figure, and nothing was selected."""
    return PrivacyStatement(
        policy="compose_all",
        trial_epsilon=trial_epsilon,
        trial_delta=delta,
        study_epsilon=trial_epsilon,
        study_delta=delta,
        guarantee=_CLAIMS["fixed_costs"],
        order=None,
        spent=trial_epsilon,
        accountants=(accountant_version("pld"),),
        assumptions=_ASSUMPTIONS,
        not_covered=_NOT_COVERED,
        non_private=math.isinf(trial_epsilon),
    )


def _secrecy(selection: Selection) -> str:
    return (
        "nothing but the winner is published; all trials are drawn from one fixed distribution, and a failed one"
        " counts as the worst; their number is never told, and was drawn before the study from a"
        f" {selection.shape} distribution of mean {selection.expected_trials:g}"
    )


def _pair(epsilon: float | None, delta: float) -> str:
    return "none claimed" if epsilon is None else f"epsilon {_rounded_up(epsilon)}, delta {delta:g}"


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "inf" if value == math.inf else value for key, value in fields.items()}


def _rounded_up(epsilon: float) -> str:
    return "inf" if math.isinf(epsilon) else f"{math.ceil(epsilon * 1000) / 1000:g}"


def _listed(title: str, items: Sequence[str]) -> list[str]:
    return [title, *(f"- {item}" for item in items)]


_PROMISE = "promise.json"  # written once, before the first trial: the plan, its costs, and the sealed K
_TRIAL_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}")


def _promise(
    planned: Sequence[TrialCost],
    delta: float,
    *,
    selection: Selection | None,
    partner: StudyLedger | None,
    **options: Any,
) -> dict[str, Any]:
    plan = plan_study(planned, delta, selection=selection, **options)
    if plan.epsilon == math.inf and options["study_epsilon"] != math.inf:
        raise InputError(
            "a planned trial has noise_multiplier=0, which makes the study NON-PRIVATE; leave it out, or set"
            " study_epsilon to inf to say that this is meant"
        )
    costs = [asdict(cost) for cost in planned]
    trials = partner.trials if partner else selection.draw() if selection else None
    return {"plan": asdict(plan), "planned": costs, "trials": trials}


def _recorded(records: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    """What is recorded of a kind, by trial."""
    return [
        (name.removeprefix(f"{kind}-").removesuffix(".json"), data)
        for name, data in records.items()
        if name.startswith(f"{kind}-")
    ]


class StudyLedger:
    """The study's spending, kept durably by its driver; a context manager. Use `StudyLedger.open`.

    What is on record is what was admitted (`admit-<trial>.json`, the worst case, before the trial starts) and
    what it was settled to (`settle-<trial>.json`). A trial that is not settled counts with its worst case, so
    a driver may die at any instant: opened again, its ledger can be too high and never too low.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        records = chain.data
        terms, promise = records[GENESIS]["terms"], records[_PROMISE]
        self.policy: Policy = terms["policy"]
        self.delta: float = terms["delta"]
        self.plan = StudyPlan(**promise["plan"])
        self._selection = Selection(**terms["selection"]) if terms["selection"] else None
        self._planned = [TrialCost(**cost) for cost in promise["planned"]]
        self._trials: int | None = promise["trials"]
        self._admitted = {trial: TrialCost(**cost) for trial, cost in _recorded(records, "admit")}
        self._settled: dict[str, int] = {trial: data["steps"] for trial, data in _recorded(records, "settle")}

    @classmethod
    def open(
        cls,
        place: str | os.PathLike[str] | Storage,
        *,
        delta: float,
        planned: Sequence[TrialCost] = (),
        policy: Policy = "compose_all",
        study_epsilon: float | None = None,
        adaptive: bool = True,
        selection: Selection | None = None,
        witness: Mapping[str, Any] | None = None,
        partner: StudyLedger | None = None,
    ) -> StudyLedger:
        """Open a study's ledger, or create it and with it fix the promise (and draw K) once and for all.

        Args:
            place: the ledger's own folder, created if needed, or its storage.
            delta, policy, study_epsilon, adaptive, selection: see `plan_study`; they never change.
            planned: the `costs` of `plan_study`; looked at only when the ledger is created.
            witness: `witness()` as stored elsewhere, to find out whether the ledger has lost anything.
            partner: ledger of the same trials on other records: K is drawn once, and this one takes its.

        Raises:
            InputError: in use by another process, an argument has changed, is outside its range, or makes the
                study one without privacy although `study_epsilon=inf` does not say so.
            DamagedLedger: the ledger does not hold all that was written to it.
            OSError: the storage failed.
        """
        options: dict[str, Any] = {"policy": policy, "study_epsilon": study_epsilon, "adaptive": adaptive}
        terms = {**options, "delta": delta, "selection": asdict(selection) if selection else None}
        storage = as_storage(place)
        # Wrong arguments are refused before they make a ledger that could only be thrown away.
        new = _PROMISE not in storage.names()
        promise = _promise(planned, delta, selection=selection, partner=partner, **options) if new else {}
        with ExitStack() as on_error:
            chain = on_error.enter_context(Chain.open(storage, terms, witness=witness))
            if _PROMISE not in chain.data:
                chain.append(_PROMISE, promise)
            ledger = cls(chain)
            on_error.pop_all()
        return ledger

    @property
    def cap(self) -> float | None:
        """The study's guaranteed ε, fixed before the first trial; None if nothing is claimed for it."""
        return self.plan.epsilon

    @property
    def trials(self) -> int | None:
        """`release_best`: the secret number K of trials to run, for the driver only; otherwise None.

        Never log, report or store it elsewhere: the guarantee holds only while K is not known.
        """
        return self._trials

    @property
    def admitted(self) -> frozenset[str]:
        """Trials that may have started. With `release_best` as secret as their number."""
        return frozenset(self._admitted)

    @property
    def settled(self) -> frozenset[str]:
        """Admitted trials whose charge is final: they never run again. As secret as `admitted`."""
        return frozenset(self._settled)

    def covers(self, cost: TrialCost) -> bool:
        """Whether the plan speaks of trials of this cost; `admit` refuses others for good."""
        if self.plan.guarantee == "fixed_costs":
            return cost in self._planned
        if self.plan.guarantee == "selection":
            return bool((cost.rdp() <= _envelope(self._planned) * (1 + _ROUNDING)).all())
        return True

    def admit(self, trial_id: str, cost: TrialCost) -> None:
        """Reserve a trial's worst case, durable before this returns; only then may the trial start.

        A trial that is already admitted at the same cost may go on, in particular after a crash; not one that is
        settled, of which only what ran until then is charged.

        Args:
            trial_id: letters, digits, `_`, `.` and `-`, at most 100.
            cost: the trial's worst case.

        Raises:
            BudgetExhausted: the trial does not fit; others that cost less still may.
            InputError: a bad id, a trial that is settled, a cost that differs from the one admitted, or one that the
                plan excludes.
            FencedError: another driver has opened the ledger; nothing is admitted.
            OSError: the storage failed; nothing is admitted.
        """
        self.check(trial_id, cost)
        if trial_id not in self._admitted:
            self._chain.append(f"admit-{trial_id}.json", asdict(cost))
            self._admitted[trial_id] = cost

    def check(self, trial_id: str, cost: TrialCost) -> None:
        """Raises what `admit` would raise about a trial, and records nothing."""
        _require(bool(_TRIAL_ID.fullmatch(trial_id)), "trial_id", trial_id, "letters, digits, _ . - (at most 100)")
        if trial_id in self._admitted:
            rule = "that of a trial that is not settled: a settled one never runs again"
            _require(trial_id not in self._settled, "trial_id", trial_id, rule)
            _require(cost == self._admitted[trial_id], "cost", cost, f"{self._admitted[trial_id]} for {trial_id}")
            return
        rules = {"fixed_costs": "one of the costs", "selection": "at most the highest of the costs"}
        _require(self.covers(cost), "cost", cost, f"{rules.get(self.plan.guarantee)} that were planned")
        if reason := self._exhausted(cost):
            raise BudgetExhausted(f"trial {trial_id} may not start: {reason}")

    def settle(self, trial_id: str, steps_charged: int) -> None:
        """Record what a trial that has ended was charged; the rest of its worst case is free again.

        Args:
            trial_id: an admitted trial; it never runs again.
            steps_charged: `TrialBudget.charged` at the end, replayed steps included; at most the steps
                admitted. The same figure may be given again.

        Raises:
            InputError: not admitted, more than admitted, or settled before to another figure.
            FencedError: another driver has opened the ledger.
            OSError: the storage failed; the worst case stays reserved.
        """
        admitted = self._admitted.get(trial_id)
        _require(admitted is not None, "trial_id", trial_id, "admitted before it is settled")
        most = admitted.steps if admitted else 0
        _require(0 <= steps_charged <= most, "steps_charged", steps_charged, f"in [0, {most}], as admitted")
        settled = self._settled.get(trial_id)
        _require(settled in (None, steps_charged), "steps_charged", steps_charged, f"{settled}, as settled before")
        if settled is None:
            self._chain.append(f"settle-{trial_id}.json", {"steps": steps_charged})
            self._settled[trial_id] = steps_charged

    def spent(self, *, exact: bool = True) -> float:
        """ε spent so far: an odometer reading, not a claim; the claim is `cap`.

        Trials that have not ended count with their worst case. It is a sum at the order that looks best
        afterwards (for fixed costs, the PLD of what ran). A selection is paid in full by its first trial.

        Args:
            exact: False is for who cannot wait: more than `FEW` different mechanisms count by RDP, a little more.
        """
        costs = self._charged()
        if self.plan.guarantee == "selection":
            return (self.cap or 0.0) if costs else 0.0
        if self.plan.guarantee != "fixed_costs":
            return _rdp_epsilon(costs, self.delta) if any(cost.steps for cost in costs) else 0.0
        read = composed_epsilon if exact or self._read_fast() else _rdp_epsilon
        return min(read(costs, self.delta), self.cap or 0.0)

    def _read_fast(self) -> bool:
        """Whether what was spent so far can be composed at once."""
        return len(_mechanisms(self._charged())) <= FEW

    def statement(
        self, trial_epsilon: float, *, assumptions: Sequence[str] = (), exact: bool = True
    ) -> PrivacyStatement:
        """What may be said about the study.

        Args:
            trial_epsilon: ε of a trial on its own, at the study's δ; infinite without privacy.
            assumptions: what the study adds to the assumptions, for example which data are declared public.
            exact: as for `spent`.
        """
        guarantee, per_trial_only = self.plan.guarantee, self.policy == "per_trial_only"
        composed = guarantee == "fixed_costs" and (exact or self._read_fast())
        accountants = ("pld",) if composed else ("pld", "rdp")
        secrecy = [_secrecy(self._selection)] if self._selection else []
        return PrivacyStatement(
            policy=self.policy,
            trial_epsilon=trial_epsilon,
            trial_delta=self.delta,
            study_epsilon=self.cap,
            study_delta=self.delta,
            guarantee=_CLAIMS[guarantee],
            order=self.plan.order,
            spent=self.spent(exact=exact),
            accountants=tuple(accountant_version(accountant) for accountant in accountants),
            assumptions=(*_ASSUMPTIONS, *secrecy, *assumptions),
            not_covered=(*([_SELECTION_NOT_COVERED] if per_trial_only else []), *_NOT_COVERED),
            non_private=math.isinf(trial_epsilon) or self.cap == math.inf,
        )

    def _charged(self) -> list[TrialCost]:
        """What each admitted trial costs: what ran if it is settled, its worst case if not."""
        return [replace(cost, steps=self._settled.get(trial, cost.steps)) for trial, cost in self._admitted.items()]

    def _exhausted(self, cost: TrialCost) -> str | None:
        """Why the study has no room for a trial, if it has none."""
        if self.plan.guarantee == "filter":
            return self._filtered(cost)
        if self.plan.guarantee == "selection" and len(self._admitted) == self._trials:
            return "all trials of the study have started"
        planned, started = Counter(self._planned), Counter(self._admitted.values())
        if self.plan.guarantee == "fixed_costs" and started[cost] == planned[cost]:
            return f"all {planned[cost]} planned trials of this cost have started; more need their own study"
        return None

    def _filtered(self, cost: TrialCost) -> str | None:
        """The filter: the divergences at the order fixed at the start may not sum up to more than the cap."""
        order, cap = self.plan.order or math.nan, self.plan.rdp_cap or 0.0
        total = math.fsum(float(one.rdp((order,))[0]) for one in (*self._charged(), cost))
        if total <= cap:
            return None
        return (
            f"with its worst case the study could exceed epsilon {self.cap:g} (divergence {total:.4g} of"
            f" {cap:.4g} at order {order:g})"
        )

    def refuse_if_fenced(self) -> None:
        """Raise FencedError if another driver has opened the ledger: the study is that one's to go on with."""
        self._chain.refuse_if_fenced()

    def witness(self) -> dict[str, Any]:
        """What to keep outside the ledger, and to give to `open`; JSON-able."""
        return self._chain.witness()

    def close(self) -> None:
        """Release the ledger; trials that are not settled stay charged with their worst case."""
        self._chain.close()

    def __enter__(self) -> StudyLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
