"""Audits as they come out, written by hand: usual ones and extreme ones."""

import math
from dataclasses import replace
from typing import Any

import torch

from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.exhibits import to_png
from fedpeft.audit.results import (
    AttackResult,
    Audit,
    BoundResult,
    Check,
    Claim,
    Column,
    DpTrial,
    Estimate,
    Exhibit,
    RankBudget,
    Slice,
)

SPAN = ThreatModel("D", "updates", "reconstruct")


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, "BCa bootstrap")


def around(value: float, width: float = 0.02) -> Estimate:
    return estimate(value, max(0.0, value - width), value + width)


def attack(
    name: str,
    metrics: dict[str, tuple[str, float, float, float]],
    threat: ThreatModel = SPAN,
    column: Column = "replay",
    width: float = 0.02,
    **settings: Any,
) -> AttackResult:
    """Each metric: unit, the attack's figure, its prior-only control, its baseline."""
    return AttackResult(
        attack=name,
        column=column,
        threat=threat,
        units={metric: row[0] for metric, row in metrics.items()},
        victims=50,
        records=50,
        metrics={m: around(found, width) for m, (_, found, _, _) in metrics.items()},
        baseline={m: around(guess, width) for m, (*_, guess) in metrics.items()},
        prior_only={m: around(other, width) for m, (_, _, other, _) in metrics.items()},
        difference={
            m: estimate(found - other, found - other - width, found - other + width)
            for m, (_, found, other, _) in metrics.items()
        },
        settings={"rank": 8, "rounds": 4, **settings},
        seconds=83.2,
    )


def span_text(found: float = 0.914, **settings: Any) -> AttackResult:
    return attack(
        "span_text",
        {
            "token_top1": ("share", found, 0.031, 0.048),
            "token_top10": ("share", min(1.0, found + 0.05), 0.09, 0.12),
            "rouge_l": ("share", found - 0.02, 0.05, 0.06),
            "exact_match": ("share", found / 2, 0.0, 0.0),
        },
        **settings,
    )


def spread(mean: float, width: float = 0.3, count: int = 50) -> tuple[float, ...]:
    """Shares about a mean, evenly apart; those beyond 0 and 1 pile up there."""
    places = (width * (2 * k / (count - 1) - 1) for k in range(count))
    return tuple(round(min(1.0, max(0.0, mean + place)), 4) for place in places)


SENTENCE = "the film is <b>a</b> quiet & moving portrait of a village by the sea"


def reading() -> AttackResult:
    """An attack on texts, with what it read to look at."""
    found = span_text()
    mean, control = found.metrics["token_top1"], found.prior_only["token_top1"]
    return replace(
        found,
        values={"token_top1": spread(0.9), "exact_match": (1.0, 0.0) * 25},
        control_values={"token_top1": spread(0.03, 0.1), "exact_match": 50 * (0.0,)},
        by_class={
            "positive": Slice(26, mean, control),
            "negative": Slice(19, around(0.87), control),
            "mixed": Slice(4, around(0.2), control),
        },
        exhibits=(
            Exhibit("text", SENTENCE, SENTENCE, "the of a the", 1.0, 0.0714),
            Exhibit("text", "a & b", "a < b", "", 0.6667, 0.0),
        ),
    )


def looking() -> AttackResult:
    """An attack on images, the same: a stripe, and what is left of it."""
    found = attack(
        "gradient_matching",
        {"psnr": ("dB", 31.4, 8.1, 8.9), "ssim": ("", 0.93, 0.12, 0.2)},
        ThreatModel("C", "updates", "reconstruct"),
        variant="a restart with the span as a constraint",
    )
    stripe = torch.zeros(1, 14, 14)
    stripe[:, 4:7, 2:12] = 1.0
    blurred = (0.6 * stripe + 0.2).expand(3, -1, -1)
    grey = torch.full_like(stripe, 0.5)
    shown = (to_png(image) for image in (stripe, blurred, grey))
    best = Exhibit("image", *shown, 31.4, 8.1)
    return replace(
        found,
        values={"psnr": tuple(20 + 0.5 * k for k in range(50))},
        control_values={"psnr": tuple(6 + 0.1 * k for k in range(50))},
        exhibits=(best, replace(best, score=22.0), replace(best, score=12.5)),
    )


def membership(found: float = 0.8, **changes: Any) -> AttackResult:
    """An attack on membership; of a hundred non-members each value is a hundredth."""
    usual = attack(
        "update_membership",
        {
            "auc": ("share", found, 0.5, 0.5),
            "tpr_at_fpr_1e-2": ("share", 0.26, 0.02, 0.01),
        },
        ThreatModel("D", "updates", "membership"),
    )
    values = {"auc": tuple(1 - round((k / 50) ** 3, 2) for k in range(50))}
    control = {"auc": tuple(round(1 - k / 50, 2) for k in range(50))}
    kept = {"values": values, "control_values": control}
    return replace(usual, **{**kept, **changes})


def misfit() -> AttackResult:
    return AttackResult(
        "span_image",
        "replay",
        SPAN,
        {"psnr": "dB"},
        0,
        0,
        {},
        {},
        {},
        {},
        {},
        0.0,
        misfit="the task is about text",
    )


def claim(**changes: Any) -> Claim:
    usual = Claim(
        unit="example",
        relation="add-or-remove-one",
        target_epsilon=8.0,
        planned_epsilon=7.9312,
        spent_epsilon=7.9312,
        delta=1e-5,
        noise_multiplier=0.8731,
        sampling_rate=0.0625,
        steps=16,
        participations=6,
        clipping_norm=1.0,
        accountant="privacy loss distributions, dp-accounting 0.6.0",
        noise="secure",
        holds_against="everybody",
        largest_success={2: 0.983, 10: 0.912, 100: 0.655, 1000: 0.3127},
    )
    return replace(usual, **changes)


def bound(name: str, epsilon: float, ceiling: float, **changes: Any) -> BoundResult:
    return BoundResult(name, epsilon, ceiling, 0.001, **changes)


def trial(**changes: Any) -> DpTrial:
    usual = DpTrial(
        trial="whole run",
        client=0,
        server_round=None,
        canaries=400,
        epsilon_upper=7.9312,
        delta=1e-5,
        bounds=(
            bound("pld", 4.127, 7.02, assumption="the plan's sampling"),
            bound("clopper-pearson", 1.31, 4.66),
            bound("one-run", 1.02, 4.9),
            bound("gaussian-fit", 6.9, math.inf, is_estimate=True),
        ),
        falsified=False,
        detail="The claimed trade-off curve is consistent with all 400 canaries.",
    )
    return replace(usual, **changes)


def round_trials(clients: int = 4, rounds: int = 6) -> tuple[DpTrial, ...]:
    return tuple(
        trial(
            trial="gradient canary",
            client=client,
            server_round=number,
            epsilon_upper=3.1,
            bounds=(bound("pld", 0.9 + 0.11 * client + 0.07 * number, 4.5),),
            detail="Consistent with the claim.",
        )
        for number in range(1, rounds + 1)
        for client in range(clients)
    )


def private_attacks() -> tuple[AttackResult, ...]:
    membership = ThreatModel("D", "updates", "membership", release="noised-compressed")
    return (
        span_text(0.034),
        attack(
            "head_leak",
            {
                "label_accuracy": ("share", 0.52, 0.51, 0.5),
                "identification_top1": ("share", 0.004, 0.002, 0.001),
            },
            ThreatModel("A", "update", "identify"),
            width=0.03,
        ),
        attack(
            "update_membership",
            {
                "auc": ("share", 0.513, 0.5, 0.5),
                "tpr_at_fpr_1e-2": ("share", 0.02, 0.01, 0.01),
            },
            membership,
            measure="projection",
        ),
        misfit(),
        attack(
            "malicious_adapter",
            {"identification_top1": ("share", 0.002, 0.001, 0.001)},
            ThreatModel("F", "update", "identify"),
        ),
    )


def surface() -> tuple[AttackResult, ...]:
    found = {
        ("lora", math.inf): 0.91,
        ("lora", 64.0): 0.12,
        ("lora", 8.0): 0.033,
        ("ssf", math.inf): 0.41,
        ("ssf", 64.0): 0.05,
        ("ssf", 8.0): 0.032,
        ("head", math.inf): 0.05,
        ("head", 64.0): 0.03,
        ("head", 8.0): 0.03,
    }
    return tuple(
        span_text(value, method=method, epsilon=epsilon, local_steps=steps)
        for (method, epsilon), value in found.items()
        for steps in (1, 5)
    )


def checks() -> tuple[Check, ...]:
    return (
        Check("configuration", "ok", "Its hash is that of result.json."),
        Check("backbone", "ok", "Fingerprint 5f1c0a as the ledgers name it."),
        Check("plan", "ok", "All ledgers follow it.", falsifies=True),
        Check("ledger of client 3", "ok", "6 entries, hash chain whole.", True),
        Check("crafted adapter", "ok", "No round's state looks crafted."),
    )


def audit(**changes: Any) -> Audit:
    """A run with privacy, in which all is well."""
    usual = Audit(
        run="3f9c1d7e",
        created="2026-11-21T18:04:11+00:00",
        config={"run": {"rounds": 20, "seed": 0}, "peft": {"name": "lora", "rank": 8}},
        config_hash="9b1f6a0c4d2e" + 52 * "7",
        system={
            "backbone": "minilm",
            "fingerprint": "5f1c0a" + 58 * "1",
            "task": "text-classification",
            "method": "lora",
            "options": {"rank": 8, "target_modules": ["query", "value"]},
            "trainable_parameters": 74_498,
            "backbone_parameters": 22_713_216,
            "versions": {"python": "3.12.3", "fedpeft": "0.1.0", "torch": "2.13.0"},
        },
        federation={
            "clients": 20,
            "cohort": 6,
            "rounds": 20,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "batch_size": 32,
            "local_epochs": 1,
            "data": "rotten-tomatoes",
        },
        release={
            "order": ["clip", "noise", "train", "compress"],
            "clipping_norm": 1.0,
            "compression": "ternary",
            "compression_options": {"density": 0.2},
            "error_feedback": True,
            "precision": "float32",
            "noise": "secure",
        },
        claim=claim(),
        checks=checks(),
        attacks=private_attacks(),
        dp_trials=(trial(), *round_trials()),
        rank_budget=(
            RankBudget(
                "encoder.layer.0.attention.self.query",
                384,
                64,
                33,
                "exact",
                "All 33 positions lie in 64 directions.",
            ),
            RankBudget("classifier", 384, 1, 1, "ranked", "One feature of a batch."),
        ),
        surface=surface(),
        limitations=(
            "Attacks by whoever holds several clients at once.",
            "Attributes of persons that no record names.",
            "What the final model says when it is asked by outsiders.",
            "Timings and sizes of messages.",
            "Attacks that train a generator on the client's language.",
        ),
        provenance={
            "command": "fedpeft audit runs/text-001",
            "seed": 0,
            "decoys": 999,
            "machine": "2 cores",
            "seconds": 412.0,
        },
    )
    return replace(usual, **changes)


def open_audit() -> Audit:
    """The default scenario: no privacy, and much is read."""
    return audit(
        run="",
        claim=None,
        dp_trials=(),
        attacks=(
            reading(),
            attack(
                "head_leak",
                {
                    "label_accuracy": ("share", 1.0, 0.5, 0.5),
                    "identification_top1": ("share", 0.98, 0.002, 0.001),
                },
                ThreatModel("A", "update", "identify"),
            ),
            looking(),
            membership(),
            attack(
                "exposure",
                {"exposure": ("bits", 14.2, 1.1, 1.0)},
                ThreatModel("D", "final-model", "extract"),
            ),
        ),
        checks=checks()[:2],
    )


def falsified_audit() -> Audit:
    """A client that forgot its noise, caught by two trials and a check."""
    broken = trial(
        trial="empty batch",
        bounds=(bound("pld", 9.87, 9.87), bound("clopper-pearson", 5.2, 5.6)),
        falsified=True,
        detail="2,000 of 2,000 answers told whether the canary took part.",
    )
    refuted = replace(round_trials(1, 1)[0], falsified=True, bounds=broken.bounds)
    return audit(
        dp_trials=(trial(), broken, refuted, *round_trials(3, 3)),
        checks=(
            *checks(),
            Check("noise twice", "failed", "Two answers bear equal noise.", True),
        ),
    )


def bare_audit() -> Audit:
    """Nothing was run and nothing is known."""
    return audit(
        attacks=(),
        dp_trials=(),
        checks=(),
        surface=(),
        rank_budget=(),
        limitations=(),
        provenance={},
        release={},
        federation={},
        system={},
        config={},
    )


def seeded_audit() -> Audit:
    return audit(claim=claim(noise="seeded", holds_against="everybody but the server"))


def inconclusive_audit() -> Audit:
    """Few victims: intervals too wide to settle anything."""
    wide = replace(
        attack("span_text", {"token_top1": ("share", 0.08, 0.03, 0.04)}, width=0.2),
        victims=3,
        records=3,
    )
    unknown = Check("ledger of client 3", "unknown", "No ledger is at hand.", True)
    return audit(attacks=(wide, misfit()), checks=(unknown,), dp_trials=())


def extreme_audit() -> Audit:
    """Figures at the ends of their ranges, words with signs of their own."""
    strange = AttackResult(
        "gradient_matching",
        "this-run",
        ThreatModel("G", "aggregate", "reconstruct", "unverified"),
        {"psnr": "dB", "ssim": "", "likeness": "share"},
        1,
        1,
        {
            "psnr": estimate(math.inf, math.inf, math.inf),
            "ssim": estimate(1.0, math.nan, math.nan),
            "likeness": estimate(-0.25, -0.5, 0.0),
        },
        {"psnr": estimate(-3.0, -9.0, 1.0)},
        {},
        {},
        {"note": "<script>alert('&')</script>", "epsilon": math.inf, "seeds": [1, 2]},
        1e6,
    )
    long = 12 * "a-name-without-any-room-to-break-"
    return audit(
        run=long,
        attacks=(strange, *private_attacks()),
        claim=claim(
            target_epsilon=math.inf,
            planned_epsilon=math.inf,
            spent_epsilon=math.inf,
            largest_success={},
        ),
        dp_trials=(*round_trials(12, 9), trial(client=None, bounds=())),
        surface=(),
        checks=(*checks(), Check(long, "failed", "Expected <b>one</b>, found two.")),
        system={"backbone": long, "none": None, "many": list(range(50))},
    )


def crowded_audit() -> Audit:
    """All at once, and in long sentences."""
    long = 3 * "Found what takes a long sentence to say, and some more, however small. "
    refuting = trial(trial="a trial of a long name", falsified=True, detail=long)
    unread = [Check(f"ledger of client {k}", "failed", long, True) for k in range(5)]
    return audit(
        run=300 * "x",
        claim=claim(unit="person", noise="seeded", holds_against="everybody but us"),
        dp_trials=(refuting, *falsified_audit().dp_trials),
        checks=(*unread, *checks()),
        limitations=tuple(9 * [long]),
    )


ALL = {
    "usual": audit,
    "open": open_audit,
    "falsified": falsified_audit,
    "bare": bare_audit,
    "seeded": seeded_audit,
    "inconclusive": inconclusive_audit,
    "extreme": extreme_audit,
    "crowded": crowded_audit,
}
