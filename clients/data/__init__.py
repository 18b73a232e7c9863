"""A site's data: where the table comes from, how it is encoded, how records are grouped by person."""
