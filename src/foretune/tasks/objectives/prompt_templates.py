"""Default prompts around a class name: 80 for images, 80 for texts.

A mean over them says what a class is whatever the style (`class_prototypes`); a mean over classes
says what a style is whatever the class (`spurious_prototypes`). FD-Align keeps 60 of 80 and
clusters these to 20.
"""

from __future__ import annotations


def _each(template: str, words: str) -> tuple[str, ...]:
    """The template with each of some words, separated by commas, in place of @."""
    return tuple(template.replace("@", word.strip()) for word in words.split(","))


IMAGES = (
    *(
        "a photo of a {}.",
        "a photo of several {}.",
        "a video frame with a {}.",
        "a logo with a {}.",
    ),
    *_each(
        "a @ photo of a {}.",
        "blurry, dark, bright, cropped, grainy, faded, sharp, overexposed, black and white, "
        "colourful, low-resolution, high-resolution, close-up, wide-angle, hazy, backlit, tilted, "
        "very old, hurried, carefully lit",
    ),
    *_each(
        "a photo of a @ {}.",
        "clean, dirty, small, large, new, old, broken, wet, shiny, plain, unusual, beautiful, "
        "half-hidden, distant",
    ),
    *_each(
        "a @ of a {}.",
        "drawing, painting, sketch, sculpture, print, cartoon, engraving, mosaic, tattoo, statue, "
        "plastic model, 3D rendering, watercolour, charcoal study, photocopy, silhouette, "
        "miniature, sticker, stamp, computer graphic, scan",
    ),
    *_each(
        "a photo of a {} @.",
        "indoors, outdoors, at night, at dusk, in the snow, in the rain, in the fog, in the sun, "
        "in the shade, on a table, on a wall, behind glass, from above, from below, from the side, "
        "from behind, from far away, in a crowd, against a white wall, under water, in a mirror",
    ),
)
TEXTS = (
    *("{}", "a text about {}", "this is about {}.", "the topic is {}.", "a question about {}"),
    *("i want to talk about {}", "please help me with {}", "can you tell me about {}?"),
    *("a short message on {}", "a long letter on {}", "a formal request concerning {}"),
    *("an angry complaint about {}", "a friendly note about {}", "hey, {}!"),
    *("someone asks: {}", "someone says: {}", "a spoken command: {}", "a headline: {}"),
    *("a keyword: {}", "my problem is {}"),
    *_each(
        "a @ message about {}",
        "polite, rude, hurried, hesitant, long-winded, terse, chatty, cheerful, worried, "
        "sarcastic, disappointed, thankful, confused, sleepy, formal, casual, clumsy, poetic, "
        "businesslike, whispered, shouted, secret, second, misspelt",
    ),
    *_each(
        "@ about {}",
        "an e-mail, a letter, a text message, a voice memo, a phone call, a review, a forum post, "
        "a diary entry, a newspaper article, a form, a note on the door, a chat with support, "
        "an advertisement, a speech, a rumour, a joke, a survey answer, a lecture",
    ),
    *(
        "quick question about {}",
        "any news on {}?",
        "not sure what to do about {}",
        "regarding {}:",
    ),
    *("sorry to bother you, but {}", "as i said before, {}", "just so you know, {}"),
    *("it is {} again", "could somebody look into {}?", "i was wondering about {}"),
    *("we need to discuss {}", "tell me more about {}", "in one word: {}", "a child mentions {}"),
    *("translated from another language: {}", "overheard: {}", "a colleague asks about {}"),
    "to whom it may concern: {}",
)
