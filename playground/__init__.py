"""A local page to look at one picture and one question: answers, maps and sources of every mode side by side."""
