"""Imports of consent: one format a module, all with one interface (`formats.Reader`)."""

from confide.privacy.consent.imports.check import Checked, Progress, check_file, parse_csv, read_checked, read_csv
from confide.privacy.consent.imports.event import COLUMNS, PSEUDONYM, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.formats import FORMATS, choose_format
from confide.privacy.consent.imports.mapping import ColumnMapping, load_mapping

__all__ = [
    "COLUMNS",
    "FORMATS",
    "PSEUDONYM",
    "Checked",
    "ColumnMapping",
    "ImportedEvent",
    "Options",
    "Progress",
    "Rejection",
    "check_file",
    "choose_format",
    "load_mapping",
    "parse_csv",
    "read_checked",
    "read_csv",
]
