"""Write the sample corpus's binary files (pdf, docx, parquet) from the texts below: `python tests/make_samples.py`.

Needs reportlab, python-docx and pyarrow. The same versions write the same bytes; test_samples.py compares the texts.
"""

from __future__ import annotations

import io
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from xml.sax.saxutils import escape

WHEN = datetime(2026, 1, 5, tzinfo=UTC)

VOYAGE_REPORT = (
    "Voyage report 26-011, Alma Brandt, Norrhaven to Lissnäs",
    [
        "# Summary",
        "The Alma Brandt sailed from Norrhaven Quay 4 on 12 January at 05:20 with 2,150 tonnes of bagged "
        "fertiliser in both holds and 610 cubic metres of ballast. She arrived at Lissnäs on 14 January at 16:45, "
        "eleven hours late. The delay had three causes: waiting for the tide at the entrance (2 hours), reduced "
        "speed in ice (6 hours), and waiting for the convoy at Storgrund (3 hours).",
        "# Ballast operations",
        "Tanks 1 and 6 were filled in Norrhaven, 305 cubic metres each, both treated. The transmittance of the "
        "water was 71 %, the lowest intensity 742 W per square metre. On 13 January at 09:10 the filter alarm A23 "
        "came twice within ten minutes; the back-flush valve was frozen and was freed with warm water. No "
        "untreated water was taken in.",
        "For passing the bar at Lissnäs, with 5.9 metres of depth, tank 6 was pumped out at sea so that the "
        "draught aft fell from 5.72 to 5.31 metres. The chief officer reports that stripping took 50 minutes "
        "instead of 20 since the eductor nozzle was worn. A new nozzle has been ordered from Elbersand.",
        "# Ice",
        "Ice began at the latitude of Fladholm, 5 to 10 centimetres thick, and was 35 centimetres thick off "
        "Lissnäs. The convoy was led by the Isbjørn. Ship number two stopped without a signal; the Alma Brandt "
        "cleared her stern by an estimated 60 metres. A near-miss report was written. The ice radar proved its "
        "worth and the searchlight on the port side did not: its motor jams below -15 degrees.",
        "# Fuel",
        "Consumption was 21.4 tonnes of marine gas oil, against 17.0 tonnes for the same voyage in November. At "
        "sea in open water the figure was 0.29 tonnes an hour at 11.5 knots.",
        "# To be done",
        "Replace the eductor nozzle. Fit a heating cable to the back-flush valve, about 4 metres, 30 watts a "
        "metre. Ask the makers of the searchlight for winter grease. Discuss distances in convoy with the masters "
        "before the next voyage.",
    ],
)

SAFETY_REVIEW = (
    "Sicherheitsbericht 2025",
    [
        "# Überblick",
        "Im Jahr 2025 gab es auf den Schiffen der Norrhaven Line 43 gemeldete Beinahe-Unfälle, vier Unfälle mit "
        "Arbeitsunfähigkeit und keinen Todesfall. Die vier Unfälle zusammen kosteten 61 Arbeitstage. Drei von "
        "ihnen geschahen auf Leitern, einer in der Kombüse.",
        "# Leitern",
        "Die Leiter zum Pumpenraum der Petra Vos ist zwei Grad steiler, als die Norm es erlaubt. Sie wird in der "
        "nächsten Dockzeit ersetzt. Bis dahin gilt: eine Hand für das Schiff, Werkzeug am Seil, niemand unter der "
        "Leiter. Der Handlauf wurde mit rauem Band umwickelt, was sich bewährt hat.",
        "# Tankbegehungen",
        "Es wurden 38 Erlaubnisscheine für geschlossene Räume ausgestellt. In zwei Fällen lag der "
        "Sauerstoffgehalt bei der ersten Messung unter 20,8 Prozent, einmal bei 17,2 Prozent in der Kettenlast "
        "der Alma Brandt. Die Kettenlast gilt seitdem als geschlossener Raum und hat ein eigenes Schild bekommen.",
        "# Lärm",
        "Im Maschinenraum der Skarv wurden 108 Dezibel gemessen. Zum Gehörschutz gehören nun zwei Schichten, "
        "Stöpsel und Kapsel. Die Besatzung wünscht sich Kapseln mit Funk; ein Versuch läuft bis Ostern mit drei "
        "Geräten.",
        "# Übungen",
        "Jedes Schiff hat zwölf Feuerübungen, sechs Übungen zur Rettung aus Tanks und vier zum Verlassen des "
        "Schiffes gehalten. Bei der Übung im Oktober fiel die Sirene der Petra Vos aus; Ursache war ein "
        "korrodierter Stecker unter dem Schornstein.",
        "# Ziele für 2026",
        "Weniger als 30 Arbeitstage Ausfall. Mehr gemeldete Beinahe-Unfälle, nicht weniger: wer nichts meldet, "
        "hat nur nichts aufgeschrieben. Ein Kurs zum Heben und Tragen für die Köche, der zweitägig ist und im "
        "Februar in Elbersand stattfindet.",
    ],
)

CREW_GUIDE = (
    "Joining guide for new crew",
    [
        "Welcome on board. This guide tells you what the contract does not.",
        "Getting there. The bus 31 leaves Norrhaven station at twenty minutes past the hour and stops at the "
        "harbour gate. At the gate you show your seafarer's book and get a yellow card; without the card you can "
        "leave the harbour and not come back in. The gate closes at 23:00, and the porter, Mr Aune, does not like "
        "to be woken.",
        "Your first hour. The mate shows you your cabin, your lifejacket, your muster station and the way from "
        "one to the other in the dark. You are measured for an immersion suit: there are four sizes, and the one "
        "that is a little too large is the right one. You sign that you have been shown all this. Do not sign "
        "before.",
        "Watches. Deck and engine work four hours on and eight off at sea. In port, working hours are from 07:00 "
        "to 16:00 with an hour for lunch. Hours of rest are written down each evening, at least ten in any "
        "twenty-four, and we mean the true ones. An officer who writes down other people's rest is sent home.",
        "Pay. Wages are paid on the 27th. Overtime counts in quarters of an hour. You may send two allotments to "
        "different banks at no cost. The advance in cash on board is limited to 150 euro a month, because the "
        "safe is small.",
        "Internet. Every cabin has a socket. In port it is fast; at sea there is one satellite link for all, and "
        "each person has 3 gigabytes a week. The bridge comes first. Films are on the server called Marit, named "
        "after our late cook.",
        "Tattoos, beards and respirators. A beard keeps a mask from sealing. Members of the rescue team shave. "
        "Nobody else has to.",
        "Going home. Reliefs are on Tuesdays and Fridays. Tell the office ten days ahead which airport you want; "
        "the default is Norrhaven by train to Brekkestad and from there by air. Your cabin is inspected by the "
        "mate, who looks under the mattress.",
    ],
)

SPARE_PARTS = (
    "Ersatzteillager Elbersand: Regeln und Bestände",
    [
        "Das Lager in Elbersand versorgt beide Küstenfrachter und den Schlepper. Es ist werktags von 7 bis 15 Uhr "
        "besetzt. Leiterin ist Frau Petersen, Durchwahl 318, Vertretung Herr Oltmanns, Durchwahl 322.",
        "Bestellen. Jede Bestellung nennt Schiff, Anlage, Teilenummer und die Zeichnung. Bestellungen ohne "
        "Teilenummer bleiben liegen, bis jemand nachfragt. Eilbestellungen, die vor 11 Uhr eingehen, sind am "
        "nächsten Morgen mit dem Kurier Falkenberg in Norrhaven.",
        "Mindestbestand. Von den folgenden Teilen liegen immer mindestens die genannten Mengen bereit: 24 "
        "Strahler für die Ballastwasseranlage, 6 Gleitringdichtungen für Ballastpumpen, 2 "
        "Wendegetriebe-Kupplungen für die Skarv, 40 Meter Lukendichtung, 3 Magnetventile für die Rückspülung des "
        "Filters, 12 Opferanoden zu je 9 Kilogramm.",
        "Regale. A: Hauptmaschinen. B: Hilfsdiesel und Kompressoren. C: Pumpen, darunter C7 mit dem vollständigen "
        "Satz für die Ballastpumpen. D: Elektrik und Automation. E: Decksausrüstung. F: alles, wovon niemand mehr "
        "weiß, wozu es gehört; jedes Jahr am 1. Juni wird Regal F versteigert.",
        "Rückgaben. Gebrauchte Teile, die überholt werden können, kommen in der grünen Kiste zurück. Dazu gehören "
        "Einspritzdüsen, Turbolader-Läufer, Pumpenwellen und Steuerkarten. Für jede Steuerkarte zahlt der "
        "Hersteller 340 Euro, wenn die Kiste nicht nach Fisch riecht.",
        "Gefahrstoffe. Farben und Verdünner lagern im Container 4 hinter der Halle. Der Schlüssel hängt beim "
        "Pförtner. Zweikomponentenfarbe, die älter als 18 Monate ist, wird nicht mehr ausgegeben.",
        "Inventur. Einmal im Jahr, in der zweiten Januarwoche, wird gezählt. 2026 fehlten drei Posten im Wert von "
        "zusammen 212 Euro; gefunden wurde dafür ein Sextant, der seit 1994 als verloren galt.",
    ],
)

INCIDENTS = [
    (
        "2019-03",
        "Risse an Spant 41",
        "Nach einem sequentiellen Ballasttausch bei zweieinhalb Metern Dünung wurden auf der Petra Vos Risse an "
        "Spant 41 gefunden, der längste 18 Zentimeter. Ursache waren schwappende Flüssigkeiten in halb leeren "
        "Tanks. Seitdem ist das Verfahren auf diesem Schiff bei mehr als zwei Metern Dünung verboten.",
        "Petra Vos",
    ),
    (
        "2020-11",
        "Tiefgang durch nasses Holz",
        "Bei der Ankunft aus Lissnäs lag die Alma Brandt elf Zentimeter tiefer als berechnet. Die Decksladung aus "
        "Birke hatte sich mit Regenwasser vollgesogen. Die Barre wurde mit 40 Zentimetern unter dem Kiel "
        "überquert, was niemand an Bord wiederholen möchte.",
        "Alma Brandt",
    ),
    (
        "2021-08",
        "Comb filter blocked by jellyfish",
        "Moon jellyfish blocked both sea chests in the basin within four minutes. The main engine was stopped by "
        "hand at a cooling water temperature of 92 degrees. The ship drifted on to the mud bank south of Quay 5 "
        "and came off with the next tide, without damage. Sea chest gratings are now inspected by camera in "
        "August.",
        "Petra Vos",
    ),
    (
        "2022-01",
        "Bollard 9 moved",
        "In the storm of 29 January the foundation of bollard 9 at Quay 4 moved by 12 millimetres under the load "
        "of two stern lines. The gusts reached 34 metres a second. The ship was held with engine and tug until "
        "the lines had been moved. The harbour office put the bollard down to 15 tonnes.",
        "Alma Brandt",
    ),
    (
        "2024-06",
        "Falsche Ventilstellung beim Lenzen",
        "Beim Lenzen von Tank 3 Backbord stand das Querventil offen. In zwanzig Minuten liefen 55 Kubikmeter nach "
        "Steuerbord, und das Schiff legte sich auf viereinhalb Grad. Der Wachingenieur bemerkte es am Kaffee in "
        "seiner Tasse. Ventile haben seither Stellungsanzeigen aus Messing.",
        "Alma Brandt",
    ),
    (
        "2025-09",
        "Drone over the deck",
        "A drone of unknown owner flew over the foredeck during mooring and distracted the winch driver. A spring "
        "parted at about 22 tonnes; nobody was in line with it. The harbour master has since forbidden drones "
        "within 150 metres of ships that make fast.",
        "Skarv",
    ),
]


def make_pdf(title: str, blocks: list[str], language: str) -> bytes:
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import Paragraph, SimpleDocTemplate, Spacer

    styles = getSampleStyleSheet()
    story = [Paragraph(escape(title), styles["Title"])]
    for block in blocks:
        is_heading = block.startswith("# ")
        story += [
            Paragraph(escape(block.removeprefix("# ")), styles["Heading2" if is_heading else "BodyText"]),
            Spacer(1, 6),
        ]
    buffer = io.BytesIO()
    # invariant: no time stamp and no random id, so that the same text gives the same file.
    SimpleDocTemplate(buffer, pagesize=A4, title=title, author="Norrhaven Line", lang=language, invariant=1).build(
        story
    )
    return buffer.getvalue()


def make_docx(title: str, blocks: list[str]) -> bytes:
    import docx

    document = docx.Document()
    properties = document.core_properties
    properties.title, properties.author = title, "Norrhaven Line"
    properties.created = properties.modified = WHEN.replace(tzinfo=None)
    document.add_heading(title, 0)
    for block in blocks:
        document.add_paragraph(block)
    buffer = io.BytesIO()
    document.save(buffer)
    return _without_times(buffer.getvalue())


def _without_times(data: bytes) -> bytes:
    # A zip carries the time at which each member was written.
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            member = zipfile.ZipInfo(name, WHEN.timetuple()[:6])
            member.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(member, old.read(name))
    return buffer.getvalue()


def make_parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("id", "title", "text", "vessel")
    columns = dict(zip(names, (list(values) for values in zip(*INCIDENTS, strict=True)), strict=True))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def make_samples(folder: Path) -> list[Path]:
    """Write the corpus's binary files below `folder`; returns their paths."""
    files = {
        "reports/voyage-26-011.pdf": make_pdf(*VOYAGE_REPORT, language="en"),
        "reports/sicherheitsbericht-2025.pdf": make_pdf(*SAFETY_REVIEW, language="de"),
        "reports/joining-guide.docx": make_docx(*CREW_GUIDE),
        "reports/ersatzteillager.docx": make_docx(*SPARE_PARTS),
        "tables/incidents.parquet": make_parquet(),
    }
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return [folder / name for name in files]


if __name__ == "__main__":
    for written in make_samples(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "samples"):
        print(written)
