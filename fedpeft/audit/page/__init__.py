"""``report.html``: what an audit found, put into words, tables and pictures."""
