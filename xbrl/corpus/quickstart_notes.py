"""What the notes of the quickstart's reports say: three kinds of notes, in pairs of opposite wordings.

The first wording of a pair makes the figure of the note matter, the second one does not. Most pairs differ in a few words.
The negation stands in the first wording of some pairs and in the second of others. Training, validation and test have
wordings of their own; no wording of a test occurs in training.
"""

from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class NoteKind:
    """One kind of note.

    `frames` are sentences with the placeholder {status}, the wording of a pair, and, if the note has a figure, {figure}.
    """

    name: str
    subject: str  # how a check names the note if its first wording applies ...
    other_subject: str  # ... and if its second one does
    frames: tuple[str, ...]
    pairs: dict[str, Pairs]  # split -> its pairs


PLEDGED = NoteKind(
    "pledged",
    "pledged assets",
    "free assets",
    (
        "Bonds in the buffer {status}; without them LCR {figure}.",
        "Some securities {status}; LCR without them {figure}.",
        "Covered bonds {status}; leaving them out, LCR is {figure}.",
        "Liquid assets {status}; LCR would be {figure} without them.",
    ),
    {
        "train": (
            ("are pledged to the central bank", "are no longer pledged to the central bank"),
            ("secure a loan that is still open", "secured a loan that has been repaid"),
            ("have not been released by the lender", "have been released by the lender"),
            ("are tied up in a repo until May", "are back from a repo since May"),
            ("serve as collateral for derivatives", "do not serve as collateral"),
            ("lie with a clearing house as margin", "were returned by the clearing house"),
            ("cannot be sold because of a lien", "can be sold, the lien is gone"),
            ("are given as security to another bank", "are not given as security to anyone"),
            ("remain encumbered", "are unencumbered"),
            ("belong to a cover pool", "have left the cover pool"),
            ("are blocked in favour of a creditor", "are not blocked in favour of anyone"),
            ("were lent out and are not back", "were lent out and are back"),
            ("back our own covered bonds", "back none of our liabilities"),
            ("stand behind a guarantee", "stood behind a guarantee that has ended"),
            ("are subject to a security interest", "are subject to no security interest"),
            ("are held under a lien", "are held without any lien"),
            ("were put up for a loan and are still up", "were put up for a loan and have been withdrawn"),
            ("cover our margin calls", "are left over after all margin calls"),
            ("may be seized by a lender", "may not be seized by any lender"),
            ("are not available, a creditor holds them", "are available, no creditor holds them"),
            (
                "are in the collateral pool of the central bank",
                "were removed from the collateral pool of the central bank",
            ),
            ("have been used to raise secured funding", "have not been used to raise secured funding"),
            ("are out on loan against cash", "are in our own vault without conditions"),
            ("remain frozen by a security deed", "are free since the security deed was cancelled"),
            ("are not yet out of a repo", "are out of a repo"),
            ("have not been returned by a borrower", "have been returned by a borrower"),
            ("are under a pledge that did not end", "are under no pledge since it ended"),
            ("are not free, they secure a debt", "are free, they secure no debt"),
        ),
        "validation": (
            ("are under a charge that has not ended", "were under a charge that has ended"),
            ("are posted with a counterparty", "are held freely, nothing is posted"),
            ("were handed over to secure funding", "were taken back when the funding was repaid"),
            ("are locked in by a security agreement", "are free of any security agreement"),
        ),
        "test": (
            ("are mortgaged to a lender", "are not mortgaged to any lender"),
            ("are held by a broker as margin", "are held by a broker free of claims"),
            ("stay committed to a secured loan", "are no longer committed to a secured loan"),
            ("have yet to be freed from a pledge", "have just been freed from a pledge"),
            ("are assigned to a creditor as cover", "are assigned to no creditor"),
            ("are charged to secure our debts", "were charged, but the charge was lifted"),
            ("went into a repo and have not come back", "went into a repo and have come back"),
            ("are promised to a counterparty as security", "are promised to nobody and free to sell"),
        ),
    },
)
CONNECTED = NoteKind(
    "connected",
    "connected clients",
    "separate clients",
    (
        "{clients} {status}; together {figure} of Tier 1.",
        "Clients {clients} {status}; they owe us {figure} of Tier 1 in all.",
        "{clients} {status}; the two come to {figure} of Tier 1.",
    ),
    {
        "train": (
            ("have the same parent", "have different parents"),
            ("are controlled by one family", "are controlled by different families"),
            ("belong to one group", "no longer belong to one group"),
            ("would fall together if one of them failed", "would not be touched if the other failed"),
            ("guarantee each other's debts", "do not guarantee each other's debts"),
            ("are subsidiaries of one holding", "were subsidiaries of one holding that was split"),
            ("have one majority owner", "have no owner in common"),
            ("depend on each other for funding", "do not depend on each other"),
            ("are run by the same owners", "are run by rival owners"),
            ("form a single risk", "are separate risks"),
            ("are not independent of each other", "are independent of each other"),
            ("share a controlling shareholder", "share nothing but an auditor"),
            ("consolidate in the same accounts", "are not consolidated in the same accounts"),
            ("live off the same project", "have nothing to do with each other"),
            ("trade under one roof and one owner", "trade under one roof with two owners"),
            ("are both majority-owned by one fund", "are minority holdings of one fund"),
            ("cannot pay without each other's cash", "pay from cash of their own"),
            ("were bought by the same group", "were sold to different groups"),
            ("are not rivals but parts of one firm", "are rivals, not parts of one firm"),
            ("take orders from one board", "take orders from boards of their own"),
            ("are mother and daughter company", "are no longer mother and daughter company"),
            ("have cross guarantees", "have cancelled their cross guarantees"),
            ("rely on the same single customer", "rely on many customers each"),
            ("are ruled by a single shareholder", "have no ruling shareholder"),
            ("are not without ties: one owner has both", "are without ties: each has its owner"),
            ("did not separate and keep one parent", "did separate and have no parent"),
            ("are brother companies", "are strangers to each other"),
            ("would not last without each other", "would last without each other"),
        ),
        "validation": (
            ("are sister companies", "are unrelated companies"),
            ("were never separated and have one owner", "were separated and have two owners"),
            ("stand and fall together", "stand on their own feet"),
            ("answer to one controlling investor", "answer to different investors"),
        ),
        "test": (
            ("are in the hands of one investor", "are in the hands of different investors"),
            ("are held by a common parent company", "are not held by a common parent company"),
            ("cannot survive without each other", "can survive without each other"),
            ("are still under common control", "are no longer under common control"),
            ("remain affiliates of the same group", "ceased to be affiliates of the same group"),
            ("are owned by the same brothers", "are owned by different people"),
            ("are economically dependent on one another", "are economically independent"),
            ("are not separate, one controls the other", "are separate, neither controls the other"),
        ),
    },
)
WAIVER = NoteKind(
    "waiver",
    "waiver",
    "no waiver",
    ("{status}.", "At this bank {status}.", "{status}, as filed with you."),
    {
        "train": (
            ("a waiver of the LCR has been granted", "a waiver of the LCR has been refused"),
            ("the supervisor has waived the LCR", "the supervisor has not waived the LCR"),
            ("the LCR does not apply to us, the group meets it", "the LCR applies to us, not to the group"),
            ("we are exempt from the LCR by decision", "we asked to be exempt from the LCR and await a decision"),
            ("our liquidity subgroup is approved, we need no own LCR", "our liquidity subgroup is not approved"),
            ("the exemption from the LCR is in force", "the exemption from the LCR has expired"),
            ("the decision to waive the LCR still stands", "the decision to waive the LCR was withdrawn"),
            ("the solo LCR is waived", "the solo LCR is no longer waived"),
            ("only the group must meet the LCR", "we must meet the LCR like the group"),
            ("the LCR waiver that we asked for was approved", "the LCR waiver that we asked for was not approved"),
            ("the supervisor released us from the LCR", "the supervisor declined to release us from the LCR"),
            ("the permission to leave the LCR to our parent is valid", "we may not leave the LCR to our parent"),
            ("the LCR was lifted for us and not restored", "the LCR was lifted for us but then restored"),
            ("we hold a valid LCR exemption", "we hold no LCR exemption"),
            ("our application for an LCR waiver succeeded", "our application for an LCR waiver failed"),
            ("the LCR obligation is suspended for us", "the LCR obligation is not suspended for us"),
            ("we have leave not to meet the LCR alone", "we have no leave to miss the LCR"),
            ("you exempted us from the LCR", "you rejected our plea for an LCR exemption"),
            ("our LCR waiver was renewed", "our LCR waiver was not renewed"),
            ("an approved waiver covers our LCR", "a waiver of our LCR is only proposed"),
            ("the LCR waiver has begun", "the LCR waiver will begin next year"),
            ("the authority confirmed that we need no own LCR", "the authority confirmed that we need our own LCR"),
            ("the court upheld our LCR waiver", "the court struck down our LCR waiver"),
            ("no LCR is required from us any more", "an LCR is required from us again"),
            ("the supervisor did grant us an LCR waiver", "the supervisor did not grant us an LCR waiver"),
            ("the supervisor let us off the LCR", "the supervisor would not let us off the LCR"),
            ("our LCR waiver has not ended", "our LCR waiver has ended"),
            ("the LCR waiver was not taken back", "the LCR waiver was taken back"),
            ("you decided that we need not report an LCR of 100%", "you did not decide on our LCR waiver"),
            ("nobody has ended our LCR exemption", "nobody has signed our LCR exemption"),
            ("the LCR waiver did not lapse", "the LCR waiver did lapse"),
            ("the LCR does not bind us since your decision", "the LCR binds us since your decision"),
        ),
        "validation": (
            (
                "our request to be freed from the LCR was accepted",
                "our request to be freed from the LCR was turned down",
            ),
            ("an LCR waiver is in place", "an LCR waiver is planned"),
            ("the authority excused us from the LCR", "the authority did not excuse us from the LCR"),
            ("the waiver of the LCR has not run out", "the waiver of the LCR has run out"),
        ),
        "test": (
            ("the authority agreed to our LCR waiver", "the authority did not agree to our LCR waiver"),
            ("the LCR duty has been removed from us", "the LCR duty has not been removed from us"),
            ("our LCR dispensation remains valid", "our LCR dispensation has lapsed"),
            ("the supervisor freed us from the LCR", "the supervisor kept us under the LCR"),
            ("our parent meets the LCR for us, as permitted", "our parent was not permitted to meet the LCR for us"),
            ("the LCR waiver, once revoked, was given back", "the LCR waiver, once given, was revoked"),
            ("relief from the solo LCR was allowed", "relief from the solo LCR was denied"),
            ("the LCR waiver took effect", "the LCR waiver is still under review"),
        ),
    },
)
KINDS = (PLEDGED, CONNECTED, WAIVER)
