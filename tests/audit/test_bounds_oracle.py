"""Our bounds equal those of jax_privacy's auditing module, on the same scores.

Its wheel is fetched by pip and checked against its hash; of it one file is used, which
needs no jax. Where it has no public parameter for what we do, its inputs are chosen so
that it does the same:

* our thresholds at ranks, each at its share of alpha, are its explicit thresholds;
* its bound for Gaussian mechanisms takes the union over every corner of the ROC curve;
  scores of 0 and 1 have three, so that three times alpha is ours at one threshold;
* it guesses "in" only. Of guesses in and out alike, only the numbers made and right
  matter, and scores with these numbers are made.
"""

import importlib.util
import math
import sys
import zipfile

import numpy as np
import pytest

from fedpeft.assets import Asset
from fedpeft.assets.sources import download
from fedpeft.audit.bounds import (
    clopper_pearson_bound,
    gdp_bound,
    one_run_bound,
    one_run_f_dp_bound,
)

MODULE = "jax_privacy/auditing.py"
WHEEL = Asset(
    name="jax-privacy",
    kind="data",
    source="pypi",
    package="jax-privacy",
    version="2.0.0",
    archive="jax_privacy-2.0.0-py3-none-any.whl",
    size_bytes=209_992,
    sha256="2621f70069ffc897d2a1976ff335871d96211cb4c5c927724fc7778306521350",
    licence="Apache-2.0",
    members=(MODULE,),
    path=MODULE,
)
DELTA, ALPHA = 1e-5, 0.05


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    wheel = download(WHEEL, folder, lambda done, total: None)
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(MODULE, folder)
    spec = importlib.util.spec_from_file_location("jax_privacy_auditing", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look up their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(params=range(20))
def scores(request):
    """Scores in and out: from one deviation apart to four, of unequal numbers."""
    rng = np.random.default_rng(request.param)
    in_count, out_count = rng.integers(60, 200, size=2)
    distance = rng.uniform(1.0, 4.0)
    return rng.normal(distance, 1.0, in_count), rng.normal(0.0, 1.0, out_count)


@pytest.mark.parametrize("delta", [0.0, DELTA])
def test_clopper_pearson_at_a_threshold(oracle, scores, delta):
    ours = clopper_pearson_bound(*scores, delta=delta, alpha=ALPHA, threshold=0.5)
    theirs = oracle.CanaryScoreAuditor(*scores).epsilon_clopper_pearson(
        ALPHA, delta, one_sided=False, threshold_strategy=oracle.Explicit(0.5)
    )
    assert ours.epsilon == pytest.approx(theirs, abs=1e-6)


def test_clopper_pearson_at_fixed_ranks(oracle, scores):
    out_scores = np.sort(scores[1])[::-1]
    last = len(out_scores) - 1
    doubling = [0, *(2**power for power in range(9) if 2 ** (power + 1) <= last + 1)]
    ranks = {*doubling, *(last - rank for rank in doubling)}
    auditor = oracle.CanaryScoreAuditor(*scores)
    theirs = max(
        auditor.epsilon_clopper_pearson(
            ALPHA / len(ranks),
            DELTA,
            one_sided=False,
            threshold_strategy=oracle.Explicit(np.nextafter(out_scores[k], math.inf)),
        )
        for k in ranks
    )
    ours = clopper_pearson_bound(*scores, delta=DELTA, alpha=ALPHA)
    assert ours.epsilon == pytest.approx(theirs, abs=1e-6)


def test_gaussian_mechanism(oracle, scores):
    in_scores, out_scores = scores
    guesses = (in_scores >= 0.5) * 1.0, (out_scores >= 0.5) * 1.0
    theirs = oracle.CanaryScoreAuditor(*guesses).epsilon_from_gdp(
        3 * ALPHA, DELTA, eps_tol=1e-9
    )
    ours = gdp_bound(*scores, delta=DELTA, alpha=ALPHA, threshold=0.5)
    assert ours.epsilon == pytest.approx(theirs, abs=1e-6)


def test_the_oracle_alone_sees_much_in_eleven_right_guesses_of_twenty(oracle):
    """It takes the negative mu of two *upper* limits for a positive one in reverse."""
    in_scores, out_scores = [1.0] * 6 + [0.0] * 4, [1.0] * 5 + [0.0] * 5
    theirs = oracle.CanaryScoreAuditor(in_scores, out_scores).epsilon_from_gdp(
        3 * ALPHA, DELTA
    )
    ours = gdp_bound(in_scores, out_scores, delta=DELTA, alpha=ALPHA, threshold=0.5)
    assert theirs > 6
    assert ours.epsilon == 0.0


def one_release(scores, share):
    """All canaries in one release, and the oracle's auditor of as many guesses."""
    values = np.concatenate(scores)
    included = np.arange(len(values)) < len(scores[0])
    guesses = int(share * len(values))
    order = np.argsort(-values)
    right = included[order[: guesses - guesses // 2]].sum()
    right += (~included[order[len(values) - guesses // 2 :]]).sum()
    wrong, silent = guesses - right, len(values) - guesses
    return values, included, guesses, ([1.0] * right, [1.0] * wrong + [0.0] * silent)


@pytest.mark.parametrize("delta", [1e-12, 0.01])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_one_run(oracle, scores, delta, share):
    values, included, guesses, as_scores = one_release(scores, share)
    theirs = oracle.CanaryScoreAuditor(*as_scores).epsilon_one_run(
        ALPHA, delta, threshold_strategy=oracle.Explicit(0.5)
    )
    ours = one_run_bound(values, included, delta=delta, alpha=ALPHA, guesses=guesses)
    assert ours.epsilon == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_one_run_of_a_gaussian_mechanism(oracle, scores, share):
    values, included, guesses, as_scores = one_release(scores, share)
    theirs = oracle.CanaryScoreAuditor(*as_scores).epsilon_one_run_fdp(
        ALPHA, DELTA, threshold_strategy=oracle.Explicit(0.5)
    )
    ours = one_run_f_dp_bound(
        values, included, delta=DELTA, alpha=ALPHA, guesses=guesses
    )
    assert ours.epsilon == pytest.approx(theirs, abs=1e-6)
