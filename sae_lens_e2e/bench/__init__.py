"""SAEs by their sources, and what they are measured on together: below reports and features pages, which both start here."""
