"""A text that is meant to break a page or a terminal."""

HOSTILE = "</script>\x00\x1b[31m\u202e<b> {{DATA}} ש 😀 & the for statement"
