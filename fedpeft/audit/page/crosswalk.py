"""Where the report answers what published guidance asks for, and the words it uses.

Headings and clause numbers alone; none of these documents certifies a report.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One demand.

    Attributes:
        source: the document.
        asks: what it asks for, in our words, with its clause where it has one.
        sections: of the report that answer.
        is_checked: whether the demand was compared with the document itself; otherwise
            the report marks it as still to be checked.
    """

    source: str
    asks: str
    sections: str
    is_checked: bool = True


_NIST = "NIST SP 800-226 (2025), Evaluating Differential Privacy Guarantees"
_EDPB = "EDPB Opinion 28/2024 on AI models"
_ISO = "ISO/IEC 27559:2022, de-identification framework"
_ICO = "ICO, guidance on identifiability and on AI"

ROWS = (
    Row(_NIST, "epsilon together with its unit of privacy", "A, C"),
    Row(_NIST, "algorithms, their parameters, utility", "C, B"),
    Row(_NIST, "the trust model: who sees what", "B, C"),
    Row(_NIST, "privacy hazards: noise source, composition, exclusions", "C, E"),
    Row(_EDPB, "likelihood that personal data are extracted from the model", "A, D"),
    Row(_EDPB, "all means reasonably likely to be used", "B"),
    Row(_EDPB, "documents of design, of tests and of resistance to attacks", "B, D, E"),
    Row(_ISO, "clause 6, context: threat modelling", "B"),
    Row(_ISO, "clause 7, data: attack modelling, largest and average risk", "D"),
    Row(_ISO, "clause 8.2.2, identifiability quantified", "A, D"),
    Row(_ISO, "clause 8.2.3, adversarial testing", "D"),
    Row(_ISO, "clause 8.3.4, evaluation again after changes", "A, E"),
    Row(_ISO, "clause 9.3.2, monitoring", "A"),
    Row(
        _ICO, "singling out, linking, inferring; the motivated intruder", "A, B", False
    ),
    Row(_ICO, "model inversion and membership inference assessed", "D", False),
)

GLOSSARY = {
    "At most, at least": "The accountant's epsilon is an upper bound, proved. That of "
    "an audit is a lower bound, measured. The truth lies between.",
    "Best guess": "What an adversary reaches without any update: the commonest word, "
    "the mean image, a coin.",
    "Canary": "An artificial record of the auditor's, planted so that its effect can "
    "be searched for. It never enters a released model.",
    "Ceiling": "The largest epsilon that so many canaries could have shown. A bound "
    "far below it says more than one close to it.",
    "Aggregate": "What becomes of a round's updates together: the step from one model "
    "to the next, which every participant sees.",
    "Control": "The same attack without the client: on another client's update, on an "
    "aggregate without this client's, or on another model. What exceeds it is what "
    "the client gave away; what does not is what everybody knew.",
    "Delta": "The chance, at most, that what is released goes beyond epsilon.",
    "Epsilon": "How much one unit can change what is released, at most: any outcome "
    "becomes at most e to the epsilon times as likely. Smaller promises more.",
    "Inconclusive": "Not measured, or not well enough to say. It is no pass.",
    "Leak": "The attack's figure minus the control's, paired by client.",
    "n": "Records that were guessed at. Intervals are at 95 % and taken over clients, "
    "since records of one client are not independent.",
    "Replay": "The same configuration and code, run on public data with canaries.",
    "Unit of privacy": "Whose data one epsilon protects: an example, a person, or a "
    "client.",
}
