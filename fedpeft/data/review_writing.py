"""Writing snippets of film reviews: real instruction data, made of Rotten Tomatoes.

The instruction names a film and a verdict, the completion is what a critic wrote. A
group is a film.
"""

from fedpeft.data import rotten_tomatoes
from fedpeft.data.examples import Completion, Examples


def load() -> Examples:
    """Reads the asset ``rotten-tomatoes``.

    Raises:
        AssetError: if the asset has not been pulled.
    """
    reviews = rotten_tomatoes.load()
    films, names = reviews.groups or (), reviews.label_names
    verdicts = [names[number] for number in reviews.labels.tolist()]
    return Examples(
        contents=tuple(
            Completion(_instruction(verdict, film), str(text))
            for verdict, film, text in zip(
                verdicts, films, reviews.contents, strict=True
            )
        ),
        labels=reviews.labels.new_zeros(len(reviews)),
        groups=reviews.groups,
        label_names=("",),
    )


def _instruction(verdict: str, film: str) -> str:
    """Asks for a review of a film, its name as people write it.

    >>> _instruction("fresh", "a_grin_without_a_cat")
    'Write one sentence of a fresh review of A Grin Without A Cat.'
    """
    title = film.replace("_", " ").title()
    return f"Write one sentence of a {verdict} review of {title}."
