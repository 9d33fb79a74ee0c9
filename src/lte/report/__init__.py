"""Tables and figures from results; nothing is measured here."""
