"""How prompts are worded. Imports nothing, so that the rendering of scenes may take its words from here."""

CAPTION_PROMPT = "Describe the image."


def with_article(name: str) -> str:
    """`name` with its indefinite article: "a dog", "an apple"."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def question_text(category: str) -> str:
    """POPE's wording: `Is there a/an {category} in the image?`."""
    return f"Is there {with_article(category)} in the image?"
