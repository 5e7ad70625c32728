"""Sentences of the full letters: one phrase table, kept in one long file.

Each tuple lists equivalent wordings, written for this project; a letter uses one of them, chosen at random. The order
and the number of the wordings decide which one the random generator picks, so changing a tuple changes the generated
corpora.

Placeholders: {label} and {cell} name the figure, {value} is its value, {limit} its limit, {gap} the difference between
them, {name_of_limit} the name of the limit, {legal} the legal reference, {row} the counterparty, {before} the value in
the previous report, {rule} the id of the rule, {others} further limits that the same figure misses, {parts} the cells
from which a ratio is computed, {absent} the cell of a part that is not reported. {bank}, {board}, {date}, {power},
{subjects}, {templates}, {deadline} and {clients} are self-explanatory.
"""

from xbrl.read.report import CellKey

# The name of a figure in a sentence, where the short label of render.py would not read well.
LABELS: dict[CellKey, str] = {
    ("C_01.00", "r0010", "c0010"): "total of own funds",
    ("C_01.00", "r0440", "c0010"): "excess of AT1 deductions taken from CET1",
    ("C_02.00.a", "r0010", "c0010"): "total risk exposure amount",
    ("C_02.00.a", "r0560", "c0010"): "risk exposure amount for foreign exchange",
    ("C_03.00", "r0020", "c0010"): "surplus or deficit of CET1",
    ("C_03.00", "r0040", "c0010"): "surplus or deficit of Tier 1",
    ("C_03.00", "r0060", "c0010"): "surplus or deficit of total capital",
    ("C_03.00", "r0130", "c0010"): "total SREP capital requirement",
    ("C_03.00", "r0140", "c0010"): "CET1 share of the total SREP capital requirement",
    ("C_03.00", "r0150", "c0010"): "Tier 1 share of the total SREP capital requirement",
    ("C_03.00", "r0160", "c0010"): "overall capital requirement",
    ("C_03.00", "r0170", "c0010"): "overall capital requirement in CET1",
    ("C_03.00", "r0180", "c0010"): "overall capital requirement in Tier 1",
    ("C_04.00", "r0740", "c0010"): "combined buffer requirement",
    ("C_04.00", "r0750", "c0010"): "capital conservation buffer",
    ("C_22.00", "r0010", "c0100"): "risk exposure amount for foreign exchange",
    ("C_28.00", "*", "c330"): "exposure after mitigation",
    ("C_28.00", "*", "c350"): "share of Tier 1",
    ("C_47.00", "r0320", "c0010"): "Tier 1 capital in the leverage ratio",
    ("C_76.00.a", "r0091", "c0010"): "adjusted amount of level 1 assets",
    ("C_76.00.a", "r0360", "c0010"): "reduction for inflows",
    ("C_84.00.d", "r0120", "c0030"): "available stable funding",
    ("F_01.01", "r0380", "c0010"): "total of assets",
    ("F_01.03", "r0250", "c0010"): "profit attributable to the owners",
}
BOARD = {
    "universal bank": "Management Board",
    "savings bank": "Board of Managing Directors",
    "cooperative bank": "Executive Board",
    "mortgage bank": "Management Board",
    "investment bank": "Board of Directors",
}
ADDRESSEE = ("To the {board} of {bank}", "{bank}, for the attention of the {board}", "Addressee: the {board} of {bank}")
SUBJECT_LINE = (
    *("Report of {date}", "Your supervisory report as of {date}", "Reference date {date}: outcome of our examination"),
    *("Supervisory reporting, reference date {date}", "Concerning the figures that you filed for {date}"),
)
# Legal basis of the measures on each subject; docs/xbrl.md says what each article provides.
POWER = {
    "capital": "Articles 102 and 104(1) CRD",
    "distributions": "Articles 141 to 142 CRD",
    "leverage distributions": "Articles 141b and 142 CRD",
    "leverage": "Article 104(1) CRD",
    "liquidity": "Article 414 CRR",
    "funding": "Articles 414 and 428b(3) CRR",
    "exposure": "Article 396(1) CRR",
    "floor": "Articles 92(3) and 465 CRR",
    "items": "Article 104(1) CRD",
    "filing": "Article 430 CRR",
}
BASIS = (
    *(
        "Under {power} we direct as follows.",
        "We issue this directive under {power}.",
        "This directive rests on {power}.",
    ),
    *("On the basis of {power} the following is ordered.", "What follows is ordered on the strength of {power}."),
    *("In exercise of our powers under {power} we order:", "Having examined your report, we act under {power}."),
    *(
        "We have reviewed the report and decide under {power}:",
        "By virtue of {power} you are required to act as set out here.",
    ),
)
FINDINGS_HEAD = ("Findings:", "We find:", "What the report shows:", "Facts established:")
MEASURES_HEAD = ("Measures:", "You shall:", "Required measures:", "We order:")

MIN = (
    "The {label} was {value} ({cell}), below the {name_of_limit} of {limit} under {legal}.",
    "{legal}: the {name_of_limit} is {limit}; the {label} in {cell} is {value}, short by {gap}.",
    "With {value} in {cell}, the {label} misses the {name_of_limit} of {limit} ({legal}) by {gap}.",
    "{cell} shows the {label} at {value}. The {name_of_limit} is {limit} ({legal}).",
    "You report {value} as the {label} ({cell}); {legal} demands the {name_of_limit} of {limit}, so {gap} are missing.",
    "A {label} of {value} in {cell} does not satisfy {legal}, whose {name_of_limit} stands at {limit}.",
    "The {name_of_limit} of {limit} ({legal}) is not met: the {label} in {cell} reaches {value} only.",
    "Measured against the {name_of_limit} of {limit}, the {label} of {value} ({cell}) falls short by {gap} ({legal}).",
)
# A ratio whose row is left out, so that the parts give it. {parts} names their cells.
RECOMPUTED = (
    "{cell} is not reported; {parts} give the {label} as {value}, below the {name_of_limit} of {limit} ({legal}).",
    "You left out {cell}. From {parts} the {label} is {value}, {gap} short of the {name_of_limit} of {limit} ({legal}).",
    "The {label}, computed from {parts} because {cell} is missing, is {value}; {legal} demands {limit}.",
    "No figure stands in {cell}. By {parts} the {label} comes to {value}, short of the {name_of_limit} of {limit} ({legal}) by {gap}.",
    "Computed from {parts}, the {label} is {value} and misses the {name_of_limit} of {limit} ({legal}); {cell} was not filed.",
    "{legal} demands {limit}. The {label} is {value} by {parts}, since {cell} holds no figure.",
)
NEGATIVE = (
    "The {label} in {cell} is negative, {value}: own funds are used up, while {legal} demands {limit}.",
    "{cell} reports a {label} of {value}; the bank has more losses than capital, against {limit} under {legal}.",
)
OTHER_LIMIT = "the {name_of_limit} of {limit} ({legal})"
ALSO_MISSED = (
    *("It also misses {others}.", "Also missed: {others}.", "The same figure falls short of {others}."),
    *("Nor does it reach {others}.", "With it the bank misses {others}."),
)
NOTE = {
    "min": (
        "Read with your note, the {label} is {value} ({cell}), below the {name_of_limit} of {limit} ({legal}).",
        "Your note takes the {label} in {cell} to {value}; {legal} demands {limit}, so {gap} are missing.",
        "By your own explanation the {label} ({cell}) comes to {value} and not to what the table shows; the {name_of_limit} is {limit} ({legal}).",
    ),
    "max": (
        "Read with your note, {cell} stands at {value}, above the {name_of_limit} of {limit} ({legal}).",
        "Your note takes the figure in {cell} to {value}, {gap} over the {name_of_limit} of {limit} under {legal}.",
        "By your own explanation {value} count in {cell}, where {legal} allows {limit}.",
    ),
    "expected": (
        "Read with your note, {cell} ({label}) should be {limit}; {value} is reported ({legal}).",
        "Your note contradicts {cell} ({label}): {value} is reported, {limit} follows from it under {legal}.",
        "By your own explanation {cell} ({label}) is {limit}, and not {value} ({legal}).",
    ),
}
WITHOUT_FIGURES = (
    "{legal} is not complied with; your note on {cell} shows it ({rule}).",
    "Your explanation on {cell} describes a violation of {legal} ({rule}).",
    "What you state on {cell} is not permitted under {legal} ({rule}).",
)
LIFTED = (
    "The {label} of {value} ({cell}) does not keep to {limit}; as you explain, this limit does not bind you here ({legal}).",
    "We take note of your explanation on {cell}: {value} against {limit} is no breach under {legal}.",
    "No measure follows from the {label} of {value} in {cell}, since your note shows that {limit} does not apply ({legal}).",
    "Given your note, {value} in {cell} is not objected to, although {limit} is missed ({legal}).",
)
TREND = {
    "fell": (
        *(
            "It was {before} a quarter earlier.",
            "One quarter earlier it stood at {before}.",
            "It has fallen from {before}.",
        ),
        *(
            "Compared with {before} at the previous date this is a decline.",
            "The figure has deteriorated from {before}.",
        ),
    ),
    "rose": (
        *("It was {before} a quarter earlier.", "It has improved from {before}, which is not enough."),
        *("The rise from {before} does not close the gap.", "At the previous date it was {before}."),
    ),
    "same": (
        "It is unchanged from the previous date.",
        "Nothing has moved since the last report.",
        "It stood there a quarter ago too.",
    ),
}
REPEATED = {
    1: (
        *("The previous report showed the same breach.", "This is the second report in a row with this breach."),
        *("We already objected to this on the last reference date.", "The breach has now lasted for two quarters."),
    ),
    2: (
        *("The breach has lasted for three quarters.", "This is the third report in a row with this breach."),
        *("Two earlier reports showed the same.", "Neither of the last two reports met the requirement either."),
    ),
}
EXPOSURE = (
    "The exposure to {row} is {value} of Tier 1 after mitigation ({cell}); the limit is {limit} ({legal}).",
    "{legal}: exposures to one client may not exceed {limit} of Tier 1; that to {row} stands at {value} ({cell}).",
    "Client {row}: {value} of Tier 1 in {cell}, {gap} above the limit of {limit} under {legal}.",
    "Towards {row} you report {value} of Tier 1 ({cell}) where {legal} allows {limit}.",
    "{cell} puts the exposure to {row} at {value} of Tier 1 capital, over the large exposure limit of {limit} ({legal}).",
)
FLOOR = (
    "The total risk exposure amount is {value} ({cell}); with the output floor it may not be below {limit} ({legal}).",
    "{legal}: the output floor requires {limit}; {cell} shows {value}, so {gap} of risk exposure are missing.",
    "You compute your ratios on {value} ({cell}) although the floor of {legal} raises the total to {limit}.",
    "The output floor is not applied in full: {value} in {cell} against {limit} under {legal}.",
    "Risk exposure of {value} ({cell}) understates the floored amount of {limit} ({legal}) by {gap}.",
)
EXPECTED = (
    "{cell} ({label}) reports {value}, whereas your own figures give {limit} ({legal}).",
    "The {label} in {cell} contradicts the other figures of the report: {value} against {limit} ({legal}).",
    "By {legal}, {cell} ({label}) should read {limit}; you filed {value}.",
    "{cell}: {value} is reported as the {label}. Recomputed from the report it is {limit} ({legal}).",
    "The figures do not agree: {label} {value} in {cell}, {limit} by the calculation under {legal}.",
    "Your {label} of {value} ({cell}) cannot be reproduced; the other cells lead to {limit} ({legal}).",
    "A difference that rounding does not explain: {cell} ({label}) holds {value}, the calculation gives {limit} ({legal}).",
)
NIL = (
    "{cell} ({label}) reports {value}, but a figure from which it should follow is not reported and counts as nil ({legal}).",
    "The {label} of {value} in {cell} stands alone: what {legal} relates it to is missing from the report.",
    "{legal}: {value} in {cell} ({label}) cannot be checked, for the report leaves out its counterpart.",
    "You filed {value} as the {label} ({cell}) without the figure that belongs to it under {legal}.",
)
MISSING = (
    "{cell} ({label}) is not reported; your own figures give {limit} ({legal}).",
    "The report leaves out the {label} in {cell}, which counts as nil where it should be {limit} ({legal}).",
    "{legal}: the {label} belongs in {cell}. Nothing is filed there, though {limit} follows from the report.",
    "No figure stands in {cell} ({label}); the other cells lead to {limit} ({legal}).",
)
SIGN = (
    "{cell} ({label}) shows {value} although the ratio is below its minimum; a deficit belongs there ({legal}).",
    "The ratio misses its minimum, yet {cell} ({label}) reports {value} and no deficit ({legal}).",
    "By {legal} a ratio under its minimum comes with a negative {label}; {cell} reads {value}.",
    "{value} in {cell} ({label}) cannot be right while the ratio lies below its minimum ({legal}).",
)
# A sum that is too large for its parts, of which one is not reported: {absent}.
PART_MISSING = (
    "{absent} is not reported and counts as nil, so that {cell} ({label}) should read {limit}; you filed {value} ({legal}).",
    "{cell} ({label}) reports {value}. The report leaves out {absent}, and the other parts come to {limit} ({legal}).",
    "{legal}: the parts of {cell} ({label}) give {limit}, since nothing is filed in {absent}; the report says {value}.",
    "By {legal} the {label} of {value} in {cell} needs a figure in {absent}; without one the sum is {limit}.",
)
MISSING_SIGN = (
    "{cell} ({label}) is not reported although the ratio is below its minimum; a deficit belongs there ({legal}).",
    "The ratio misses its minimum, yet the {label} in {cell} is left out, where {legal} calls for a deficit.",
    "No deficit is filed in {cell} ({label}) for a ratio under its minimum ({legal}).",
)
TSCR = (
    "{cell} ({label}) reports {value}; a requirement below {limit} cannot exist ({legal}).",
    "The {label} in {cell} is given as {value}, less than the {limit} of Pillar 1 that it contains ({legal}).",
    "{legal}: the {label} is at least {limit}. The {value} in {cell} is an error.",
    "You state {value} as the {label} ({cell}); with Pillar 1 it is never below {limit} ({legal}).",
)
CAP = (
    "{cell} ({label}) reports {value}; the cap on inflows allows {limit} ({legal}).",
    "Inflows are taken into account with {value} ({cell}), beyond the cap of {limit} under {legal}.",
    "{legal} caps the {label} at {limit}; you applied {value} in {cell}.",
    "The {label} of {value} in {cell} exceeds three quarters of outflows, that is {limit} ({legal}).",
)
MEASURE = {
    ("capital", "pillar2"): (
        "Submit {deadline} a capital plan that restores own funds by issuance or by reducing risk exposure, and retain all profits until then.",
        "Retain profits in full and present {deadline} a capital plan with the steps, the amounts and the dates of each step.",
        "Raise own funds or shed risk exposure; a capital plan to that end is due {deadline}. Profits stay in the bank until it is carried out.",
        "File {deadline} a capital plan approved by the supervisory body, and use net profits to strengthen own funds.",
        "Restore own funds to your requirement; the plan, with amounts and dates, is due {deadline} (CRD Art. 104(1)(c)).",
    ),
    ("capital", "pillar1"): (
        "Make no distributions and pay no variable remuneration until own funds are restored; submit {deadline} a recapitalisation plan approved by your shareholders' body.",
        "Suspend all distributions at once, stop new business that raises risk exposure, and submit {deadline} a plan to recapitalise the bank.",
        "Convene your owners for a capital increase and bring us {deadline} a plan that states amount, source and date; until then nothing may be distributed.",
        "Freeze dividends, coupons and bonuses, and lodge {deadline} a recapitalisation plan with binding commitments of the investors.",
        "The minimum must be met at all times: lodge {deadline} a capital plan that restores it, and distribute nothing before (CRD Art. 104(1)(c) and (i)).",
    ),
    ("distributions", "buffer"): (
        "The combined buffer requirement is not met: distributions are limited to the maximum distributable amount, which you shall calculate and notify to us before any distribution (CRD Art. 141), and a capital conservation plan is due {deadline} (CRD Art. 142).",
        "Calculate the maximum distributable amount and notify it to us; until then pay neither dividends nor AT1 coupons and grant no variable remuneration (CRD Art. 141). Submit {deadline} a capital conservation plan (CRD Art. 142).",
        "Submit {deadline} a capital conservation plan under CRD Art. 142. Nothing may be distributed before you have calculated the maximum distributable amount and notified us of it, and no more than that amount afterwards (CRD Art. 141).",
        "Since own funds do not cover the combined buffer, CRD Art. 141 restricts your distributions: compute the maximum distributable amount, report it, and stay within it. The capital conservation plan of CRD Art. 142 is due {deadline}.",
    ),
    ("leverage distributions", "buffer"): (
        "The leverage ratio buffer is not met: calculate the leverage ratio related maximum distributable amount and notify it to us before any distribution (CRD Art. 141b); a capital conservation plan is due {deadline} (CRD Art. 142).",
        "Submit {deadline} a capital conservation plan (CRD Art. 142). Distributions are limited to the leverage ratio related maximum distributable amount, which you shall compute and report first (CRD Art. 141b).",
        "CRD Art. 141b restricts your distributions until the leverage ratio buffer is met again: notify us of the amount that may be distributed, and file {deadline} a capital conservation plan (CRD Art. 142).",
    ),
    ("leverage", "pillar2"): (
        "Submit {deadline} a plan that reduces the leverage exposure or raises Tier 1 capital.",
        "Let the balance sheet not grow and present {deadline} a plan for reducing leverage.",
        "Present {deadline} a leverage plan; until it is approved, total exposure may not exceed its present amount.",
    ),
    ("leverage", "pillar1"): (
        "Reduce the leverage exposure without delay, take on no new exposure that is not collateralised in cash, and submit {deadline} a plan to restore the ratio.",
        "Stop the growth of the balance sheet at once and submit {deadline} a plan of asset sales and Tier 1 issuance.",
        "Sell assets or raise Tier 1 now; the leverage plan with amounts and dates is due {deadline}, and no new exposure may be taken on before.",
    ),
    ("liquidity", "pillar1"): (
        "Enlarge the liquidity buffer, lengthen short-term funding, and submit {deadline} a plan for the timely restoration of the ratio.",
        "Submit {deadline} a restoration plan that names the liquid assets to be bought and the outflows to be reduced.",
        "Buy eligible liquid assets and cut outflows within 30 days; the restoration plan is due {deadline}.",
        "Restore the liquidity coverage ratio; the plan of CRR Art. 414 is due {deadline}, with the assets that you will add to the buffer.",
    ),
    ("funding", "pillar1"): (
        "Replace short-term by stable funding and submit {deadline} a funding plan.",
        "Submit {deadline} a funding plan with the term and the amount of each planned issue.",
        "Present {deadline} a funding plan that closes the gap by term deposits or by issues beyond one year.",
        "Restore the net stable funding ratio; the plan of CRR Art. 414 is due {deadline}.",
    ),
    ("exposure", "pillar1"): (
        "Reduce the exposure below the limit by repayment, sale or eligible protection {deadline}, and grant this client nothing new.",
        "Take on no further exposure to this client and bring it under the limit {deadline}.",
        "Cut the exposure to the limit {deadline}; until then no drawing by this client may be honoured that you can refuse.",
        "Remove the excess over the limit {deadline} and explain how it arose (CRR Art. 396).",
    ),
    ("floor", "pillar1"): (
        "Apply the output floor, file the own funds templates again {deadline}, and show that every capital requirement is still met on the floored amount.",
        "Correct the total risk exposure amount {deadline} and have internal audit review how the floor is computed.",
        "Recompute all ratios on the floored amount {deadline} and submit the calculation of the standardised total.",
        "Raise the total risk exposure amount to the floored one and file the own funds templates again {deadline}.",
    ),
    ("items", "pillar1"): (
        "Take the item out of own funds, recompute the ratios without it, and file the own funds templates again {deadline}.",
        "Exclude what does not qualify as own funds and submit {deadline} the corrected templates.",
        "File own funds and ratios anew {deadline}, without the item that does not qualify.",
    ),
    ("filing", "filing"): (
        "Correct {templates} and file again {deadline}, with an explanation of the error.",
        "File {templates} again {deadline} and state how the error arose and how it will be prevented.",
        "Submit corrected figures for {templates} {deadline} and name the control that failed.",
        "Resubmit {templates} {deadline}; attach a note on the cause of the error.",
        "{templates} must be filed anew {deadline}, reconciled with your books.",
    ),
}
# Added where the shortfall is large or has lasted.
AT_ONCE = {
    "capital": ("Stop today all business that raises risk exposure.", "Until then we shall attend the meetings of your board."),
    "leverage": ("Total exposure may not grow from today.", "Every new exposure needs our prior consent."),
    "liquidity": (
        "Put the contingency funding plan into effect today and grant no uncommitted loans.",
        "Activate your contingency funding plan at once and stop lending that is not committed.",
    ),
    "funding": ("Grant no new long-term loans until stable funding covers them.", "Suspend new lending beyond one year."),
    "exposure": ("Obtain collateral at once.", "Halt all business with this client that raises the exposure."),
    "floor": ("Distributions are suspended until we have checked the floored ratios.", "Attach an auditor's confirmation."),
}  # fmt: skip
# Additional measures for a business model.
BY_TYPE = {
    ("capital", "savings bank"): ("Your municipal owners must be informed of this letter.", "Inform your guarantor institutions of the shortfall."),
    ("capital", "cooperative bank"): ("Redeem no member shares until then.", "The redemption of member shares needs our prior consent."),
    ("capital", "investment bank"): ("Cut risk limits of the trading book accordingly.", "Trading limits are to be lowered in step."),
    ("capital", "mortgage bank"): ("Grant no new commercial mortgages above 60% of value.", "Limit new mortgage lending to repayments received."),
    ("capital", "universal bank"): ("Include every subsidiary in the plan.", "The plan covers the group, not the parent alone."),
    ("liquidity", "investment bank"): ("Unwind matched repo positions that bring no liquidity.", "Reduce reliance on repo that matures within 30 days."),
    ("liquidity", "mortgage bank"): ("Keep the cover pool buffer of your covered bonds separate.", "The liquidity buffer of the cover pool may not be counted twice."),
    ("liquidity", "savings bank"): ("Contact your central institution for a committed line.", "Use the liquidity support of your savings bank group."),
    ("liquidity", "cooperative bank"): ("Ask your central institution for a committed line.", "Call on the liquidity support of your network."),
    ("liquidity", "universal bank"): ("Report the outflows by currency.", "State the position in each significant currency."),
    ("funding", "mortgage bank"): ("Match new mortgages with covered bonds of like term.", "Issue covered bonds to fund the mortgage book."),
    ("funding", "investment bank"): ("Trading assets must not rest on overnight funding.", "Term out the funding of the trading book."),
    ("leverage", "investment bank"): ("Compress derivatives and repo books first.", "Begin with the matched book of securities financing."),
}  # fmt: skip
WORKING_DAYS = {2: "two", 3: "three", 5: "five", 7: "seven", 10: "ten", 15: "fifteen", 20: "twenty", 30: "thirty"}
FROM = ("of receipt", "of receiving this letter", "from the date of service")
PERSISTS = (
    "Because the breach persists, we set a shorter term than before.",
    "Since our earlier objection had no effect, the term is shortened.",
    "The repetition weighs heavily; the term is therefore short.",
)
SUBJECT = {
    **{"capital": "own funds", "leverage": "leverage", "liquidity": "liquidity", "funding": "stable funding"},
    **{"exposure": "large exposures", "floor": "the output floor", "items": "own funds"},
    **{"distributions": "the capital buffers", "filing": "the corrected templates"},
}
DAILY_SUBJECTS = ("liquidity", "funding")
DAILY_DUTY = (
    "Report on {subjects} daily, by the end of each business day, until the requirement is met again (CRR Art. 414).",
    "Until compliance is restored, the figures on {subjects} are due by the end of every business day (CRR Art. 414).",
    "CRR Art. 414 requires a daily report on {subjects} until we release you from it.",
)
DUTY = {
    "filing": (
        *("Report on progress with the next regular report.", "Inform us of progress with your next filing."),
        *(
            "Add a short note on {subjects} to your next report.",
            "With the next report, state what was done on {subjects}.",
        ),
    ),
    "buffer": (
        "Report monthly on {subjects} until the buffer is met again.",
        "Until the buffer is full, send us the figures on {subjects} every month.",
        "A monthly report on {subjects} is due by the tenth of each month until further notice.",
    ),
    "pillar2": (
        "Report every two weeks on {subjects} until compliance is restored.",
        "Until compliance is restored, send us the figures on {subjects} on the first and the fifteenth of each month.",
        "A report on {subjects} is due every second week, until we confirm compliance.",
        "Every two weeks you shall report on {subjects}, until further notice.",
    ),
    "pillar1": (
        "Report weekly on {subjects} until we release you from this duty.",
        "Send us the figures on {subjects} every week until further notice.",
        "Each Monday a report on {subjects} is due, until we confirm compliance.",
        "You shall report on {subjects} at the end of every week.",
    ),
}
CLOSING = {
    "filing": (
        "",
        "We expect no repetition.",
        "No further measure is intended at present.",
        "The matter is closed once this is done.",
    ),
    "repeated filing": (
        "We shall have your reporting process examined if the error occurs again.",
        "Further measures on your reporting are reserved.",
    ),
    "buffer": (
        "If we do not approve the plan, we may require more own funds by a set date (CRD Art. 142(4)).",
        "We shall assess whether the plan is likely to restore the buffer (CRD Art. 142(3)).",
        "Further restrictions on distributions are reserved (CRD Art. 142(4)).",
    ),
    "pillar2": (
        "We may take further measures under CRD Art. 104 if the plan is late or insufficient.",
        "Further measures under CRD Art. 104 are reserved.",
        "Should the term pass without result, we shall order more (CRD Art. 104).",
        "We shall review the position with you after the term; further restrictions are reserved.",
    ),
    "pillar1": (
        "Failure to comply may lead to administrative penalties and to the withdrawal of the authorisation.",
        "We draw your attention to penalties under CRD Art. 67 and to the conditions of your authorisation under CRD Art. 18.",
        "If you do not comply, we shall consider the withdrawal of the authorisation (CRD Art. 18).",
        "Non-compliance is subject to administrative penalties.",
    ),
}
OBJECTION = (
    *(
        "",
        "",
        "Objections may be lodged within one month.",
        "You may be heard within ten working days; this does not suspend the measures.",
    ),
    "An appeal has no suspensive effect.",
)
LARGE_EXPOSURE_NOTE = (
    "For information: {clients} at or above {limit} of Tier 1 must be reported ({legal}); this is no violation.",
    "Note without measure: {legal} applies to {clients} of {limit} of Tier 1 or more.",
    "We note {clients} of {limit} of Tier 1 or more; {legal} requires a report, which was made.",
)
# Sentences on triggers that are noted one by one.
TRIGGER_NOTES = {
    "LE_GSII": (
        "State whether {row}, to which you have an exposure of {value} of Tier 1 ({cell}), is a G-SII: between G-SIIs the limit is {limit} ({legal}). The report does not say; this is no violation.",
        "For examination: {value} of Tier 1 are owed by the institution {row} ({cell}). Should it be a G-SII, {legal} allows {limit}; the report alone does not decide it.",
    ),
    "FX_DEMIN": (
        "For information: the net foreign exchange position exceeds the threshold of {legal}, so the own funds requirement applies; this is no violation.",
        "Note without measure: the foreign exchange position calls for own funds under {legal}.",
        "We note that {legal} applies to your foreign exchange position; nothing follows from this.",
    ),
    "P2G_TC": (
        "The {label} of {value} is below our guidance of {limit} ({legal}). Guidance is no requirement: tell us how you intend to return to it.",
        "Note without measure: the {label} ({value}) uses part of the Pillar 2 guidance, which with the requirements stands at {limit} ({legal}).",
        "With {value} the {label} meets the requirements but not the guidance of {limit}; {legal} makes that no breach.",
    ),
}
CLEAN_OPENING = (
    "Your report shows no breach of the requirements examined and no contradiction between its figures.",
    "The figures meet the requirements that we examined and agree with each other.",
    "We examined your report and found neither a breach nor an error.",
    "The examination of your filing gave no cause for objection.",
    "All requirements that we tested are met, and the figures are consistent.",
    "Having checked {templates}, we found nothing to object to.",
    "Neither a shortfall nor an inconsistency came to light in {templates}.",
    "{templates} were examined; they comply with the law and with each other.",
)
CLEAN_TIGHTEST = (
    "The closest margin is that of the {label}: {value} against {limit}.",
    "Least room is left in the {label}, with {value} over a requirement of {limit}.",
    "The {label} of {value} lies nearest to its requirement of {limit}; keep it under watch.",
    "Of all requirements the one on the {label} ({limit}) is met most narrowly, at {value}.",
    "We draw attention to the {label}: {value}, where {limit} are required.",
    "Your smallest reserve is {gap}, in the {label} ({value} against {limit}).",
)
CLEAN_MOVE = (
    "Since the previous date the {label} went from {before} to {value}.",
    "The {label} stood at {before} a quarter ago and is {value} now.",
    "Compared with the last report the {label} moved from {before} to {value}.",
    "From {before} at the last date, the {label} came to {value}.",
)
CLEAN_OUTCOME = (
    *("No measure is required.", "We take no measure.", "Nothing is required of you.", "No directive is issued."),
    *("There is no need for action.", "We refrain from any measure under Article 102 CRD."),
)
CLEAN_DUTY = (
    *(
        "File the next report as usual.",
        "The next report is due on the regular date.",
        "Reporting continues on the regular dates.",
    ),
    *("Your reporting duties remain as they are.", "Continue to report quarterly under Article 430 CRR."),
    "The regular reporting duty under Article 430 CRR continues.",
)
CLEAN_RESERVE = (
    *("", "", "This letter is without prejudice to later examinations.", "Later findings are reserved."),
    *("The examination covered the filed templates only.", "Figures that were not filed have not been judged."),
)
JUDGEMENT = {
    "filing": ("",),
    "buffer": (
        *("", "The buffer is there to be used in bad times, at the price that the law sets on it."),
        *("The requirements of both pillars are met; the buffer above them is not.", "Your buffer is used up in part."),
    ),
    "pillar2": (
        *("The bank holds less than we require of it.", "We regard the position as in need of prompt action."),
        *("This calls for action by the whole board.", "Your own requirement is binding, as the minimum is."),
    ),
    "pillar1": (
        *(
            "A minimum of the law is not met; that is a grave matter.",
            "We regard the position of the bank as seriously impaired.",
        ),
        *("The law demands this minimum at all times.", "The breach allows no delay, whatever its size."),
    ),
}
