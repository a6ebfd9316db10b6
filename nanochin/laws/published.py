"""Published laws, for comparison. Their constants are for other tokenizers and corpora; compare exponents."""

import math
from dataclasses import replace

import numpy as np

from nanochin.laws.cost import Cost
from nanochin.laws.law import Law, PowerLaw

# Besiroglu et al. 2024 (arXiv 2404.10102), the refit of Chinchilla's own runs: the default law.
BESIROGLU = Law("Besiroglu et al. 2024", E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)

# Hoffmann et al. 2022 (arXiv 2203.15556), Approach 3, with the digits of its LaTeX source. The printed 1.69, 406.4,
# 410.7, 0.34, 0.28 are rounded so much that they move the optimum of Gopher's budget from 40B to 32B parameters.
_logs = (0.5267228, 6.0073404, 6.0179186)  # log E, log A, log B
HOFFMANN = Law("Hoffmann et al. 2022, Approach 3", *map(math.exp, _logs), alpha=0.33917084, beta=0.2849083)

# Tables 3 and A3 of Hoffmann et al. 2022: parameters, then FLOPs and tokens of the compute-optimal run according to
# Approaches 1, 2 and 3. As printed, except Approach 3 at 175B, where the paper has 1.26e24, a tenth of 6 N D.
TABLE_3 = (
    (0.4e9, 1.92e19, 8.0e9, 1.84e19, 7.7e9, 2.21e19, 9.2e9),
    (1e9, 1.21e20, 20.2e9, 1.20e20, 20.0e9, 1.62e20, 27.1e9),
    (10e9, 1.23e22, 205.1e9, 1.32e22, 219.5e9, 2.46e22, 410.1e9),
    (67e9, 5.76e23, 1.5e12, 6.88e23, 1.7e12, 1.71e24, 4.1e12),
    (175e9, 3.85e24, 3.7e12, 4.54e24, 4.3e12, 1.26e25, 12.0e12),
    (280e9, 9.90e24, 5.9e12, 1.18e25, 7.1e12, 3.52e25, 20.1e12),
    (520e9, 3.43e25, 11.0e12, 4.19e25, 13.4e12, 1.36e26, 43.5e12),
    (1e12, 1.27e26, 21.2e12, 1.59e26, 26.5e12, 5.65e26, 94.1e12),
    (10e12, 1.30e28, 216.2e12, 1.75e28, 292.0e12, 8.55e28, 1425.5e12),
)
# The paper prints exponents to two digits and no constants: both are fitted to its table of predictions.
_n, _c1, _d1, _c2, _d2, _, _ = np.log(TABLE_3).T
HOFFMANN_1 = PowerLaw.through("Hoffmann et al. 2022, Approach 1", _c1, _n, _d1)
HOFFMANN_2 = PowerLaw.through("Hoffmann et al. 2022, Approach 2", _c2, _n, _d2)

# Kaplan et al. 2020 (arXiv 2001.08361): N = 1.3e9 C^0.73 with C in PF-days (8.64e19 FLOPs), 6 N D of non-embedding N.
_k = 1.3e9 / 8.64e19**0.73
KAPLAN = PowerLaw("Kaplan et al. 2020", _k, 0.73, 1 / (6 * _k), 0.27, "non_embedding", "kaplan")

# Muennighoff et al. 2023 (arXiv 2305.16264), fitted on C4 with alpha = beta: the base of their data-constrained law
# (allocation.DataConstrained).
_logs = (0.6254804, 6.255414, 7.3049974)
MUENNIGHOFF = Law("Muennighoff et al. 2023", *map(math.exp, _logs), alpha=0.3526596, beta=0.3526596)

PUBLISHED = (HOFFMANN_1, HOFFMANN_2, HOFFMANN, BESIROGLU, KAPLAN, MUENNIGHOFF)


def advice(law: Law | PowerLaw, cost: Cost, C) -> tuple:
    """(N, D) of a published law for C FLOPs counted by `cost`: of a `Law` the lowest loss at that cost; of a `PowerLaw`
    in 6ND the optimum that costs C; Kaplan's law keeps its own FLOP count."""
    if isinstance(law, Law):
        return replace(law, cost=cost).optimal(C)
    if law.flops_convention != "6nd":
        return law.optimal(C)
    six = np.geomspace(np.min(C) / 1e3, np.max(C) * 1e3, 2000)
    spent = cost.flops(*law.optimal(six))
    return law.optimal(np.exp(np.interp(np.log(C), np.log(spent), np.log(six))))
