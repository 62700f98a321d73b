"""The report of a comparison: page, figures, summary.

Files:

    reading.py      the files of a comparison, run or benchmark
    finished.py     whether the files of a run agree
    diagnosed.py    the diagnostics of a run
    summary.py      means, spreads, paired differences
    verdict.py      what was found, in sentences
    explained.py    each rule in a sentence
    page.py         `report.html`
    sections.py     its sections
    page.html       its template: colours, layout, scripts
    figures.py      its figures
    benches.py      benchmarks of memory, speed and scaling
    frontier.py     accuracy and seconds against memory
    confusion.py    classes that a layer confuses
    filters.py      the first layer's weights as pictures
    language.py     bits per byte, and text
"""
