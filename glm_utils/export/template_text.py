"""Put the prompt_text of a training into chat templates, as a literal of Jinja or Go.

Engines differ in the escapes that they know, so few are used. Braces never stand beside each other or beside % and #:
some engines look for `{{` and `-%}` in the whole template, also inside literals.
"""

import json

QUESTION = "问："  # what stands before a question in every template
JINJA_ESCAPES = str.maketrans(
    {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t", "{": "{' ~ '", "}": "' ~ '}"}
)


def jinja_with_text(template: str, prompt_text: str) -> str:
    """Return a Jinja template that writes a text before every question.

    Args:
        template: The template, in which QUESTION ends a literal in single quotes.
        prompt_text: The text; empty: the template stays as it is.
    """
    return template.replace(f"{QUESTION}'", f"{QUESTION}{prompt_text.translate(JINJA_ESCAPES)}'")


def go_with_text(template: str, prompt_text: str) -> str:
    """Return a Go template that writes a text before every question; it suits the triple quotes of a Modelfile too.

    Source: Go's specification, interpreted string literals; the escapes of JSON are among theirs.

    Args:
        template: The template, in which QUESTION is text.
        prompt_text: The text; empty: the template stays as it is.
    """
    if not prompt_text:
        return template
    literal = json.dumps(prompt_text, ensure_ascii=False).replace("{", "\\u007b").replace("}", "\\u007d")
    return template.replace(QUESTION, f"{QUESTION}{{{{ {literal} }}}}")
