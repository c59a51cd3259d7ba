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
            Completion(
                f"Write one sentence of a {verdict} review of {film}.", str(text)
            )
            for verdict, film, text in zip(
                verdicts, films, reviews.contents, strict=True
            )
        ),
        labels=reviews.labels.new_zeros(len(reviews)),
        groups=reviews.groups,
        label_names=("",),
    )


def _title(film: str) -> str:
    """Returns a film's name as people write it.

    >>> _title("a_grin_without_a_cat")
    'A Grin Without A Cat'
    """
    return film.replace("_", " ").title()
