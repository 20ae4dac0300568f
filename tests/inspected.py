"""Text designed to break a web page or a terminal."""

HOSTILE = "</script>\x00\x1b[31m\u202e<b> {{DATA}} ש 😀 & the for statement"
