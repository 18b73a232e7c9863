"""Differential privacy per person: events, accountants, the ledger's filter, calibration, noise."""

from confide.privacy.dp.accounting import LEDGER_LABEL, RUN_LABEL, person_epsilon, rdp_epsilon, run_epsilon, run_label
from confide.privacy.dp.budget import RenyiBudget
from confide.privacy.dp.calibration import calibrate, calibrate_run
from confide.privacy.dp.events import PrivacyEvent, Role
from confide.privacy.dp.ledger import Ledger
from confide.privacy.randomness import SecureRandom

__all__ = [
    "LEDGER_LABEL",
    "RUN_LABEL",
    "Ledger",
    "PrivacyEvent",
    "RenyiBudget",
    "Role",
    "SecureRandom",
    "calibrate",
    "calibrate_run",
    "person_epsilon",
    "rdp_epsilon",
    "run_epsilon",
    "run_label",
]
