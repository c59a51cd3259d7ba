"""Lower bounds on epsilon, from the scores that canaries got.

A *score* says how much a release looks as if the canary had been in the data: larger
means "in". Each bound states what it rests on and its *ceiling*, the most that so many
canaries could show if they told themselves apart perfectly: a claim above the ceiling
is out of reach of the experiment, and a bound far below it is not yet good news.

====================  ==========================  ================================
name                  canaries                    rests on
====================  ==========================  ================================
``clopper-pearson``   half in, half out, each in  nothing else
                      an experiment of its own
``gdp``               the same                    Gaussian noise, no sampling
``pld``               the same                    Gaussian noise, claimed sampling
``one-run``           all in one release, each    nothing else
                      in by its own fair coin
``one-run-f-dp``      the same                    Gaussian noise, no sampling
``gaussian-fit``      as for the first            normal scores: *an estimate*
``one-shot-cosine``   random directions, all in   normal cosines: *an estimate*
====================  ==========================  ================================

Whether a claim is falsified rests on none of them but on one test of the claimed curve
itself: :func:`consistent_with_claim`.
"""

from fedpeft.audit.bounds.error_rates import consistent_with_claim, count_errors
from fedpeft.audit.bounds.estimates import (
    gaussian_fit_estimate,
    one_shot_cosine_estimate,
)
from fedpeft.audit.bounds.lower_bound import LowerBound
from fedpeft.audit.bounds.many_runs import (
    clopper_pearson_bound,
    gdp_bound,
    pld_bound,
)
from fedpeft.audit.bounds.one_run import (
    one_run_bound,
    one_run_consistent_with_claim,
    one_run_f_dp_bound,
)

__all__ = [
    "LowerBound",
    "clopper_pearson_bound",
    "consistent_with_claim",
    "count_errors",
    "gaussian_fit_estimate",
    "gdp_bound",
    "one_run_bound",
    "one_run_consistent_with_claim",
    "one_run_f_dp_bound",
    "one_shot_cosine_estimate",
    "pld_bound",
]
