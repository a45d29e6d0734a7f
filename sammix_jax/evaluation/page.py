"""The frame of the report's page: its words and its looks, for `str.format`."""

# What is said only of a system that has a CAM.
PROMPT_NOTE = " An empty CAM prompts with the central box, which counts in the IoU."
CAM_NOTE = """ Below: the class activation map,
<span class="key" style="color:{box}"></span>its box,
<span class="key" style="color:{truth};border-top-style:dashed"></span>the true box."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{system}: {organ}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #8883;
        --card: #8881; --page: #fcfcfd; --warn: #ffb22422 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #edeef0; --soft: #a0a4ab; --page: #111113 }} }}
* {{ box-sizing: border-box }}
body {{ font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }}
h1 {{ font-size: 1.75rem; margin: 0 }} h2 {{ font-size: 1.2rem; margin: 2.75rem 0 .5rem }}
p {{ margin: .5rem 0; max-width: 46rem }}
.soft, small, figcaption, summary {{ color: var(--soft) }}
.warning {{ background: var(--warn); border-left: 4px solid #ffb224; padding: .6rem .9rem;
           max-width: none; overflow-wrap: anywhere }}
.tiles {{ display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 .5rem }}
.tiles div {{ background: var(--card); border-radius: .6rem; padding: .7rem 1.1rem; flex: 1 }}
.tiles b {{ display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums }}
.tiles span {{ color: var(--soft); font-size: .85rem; white-space: nowrap }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .9rem;
        font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .5rem .7rem .5rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; overflow-wrap: anywhere }}
thead th {{ color: var(--soft); font-weight: 500; white-space: nowrap }}
.scroll {{ overflow-x: auto }} .scores td {{ white-space: nowrap }}
tbody th small {{ display: block; font-weight: 400; max-width: 15rem; line-height: 1.35 }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
           gap: 1rem }}
.plot {{ max-width: 36rem }}
figure {{ margin: .5rem 0 }} figcaption {{ font-size: .9rem; margin-top: .3rem }}
img {{ max-width: 100%; height: auto; border-radius: .4rem }}
pre {{ background: var(--card); padding: 1rem; overflow-x: auto; font-size: 13px;
      border-radius: .6rem }}
details {{ margin: 1rem 0 }} summary {{ cursor: pointer }}
.key {{ display: inline-block; width: 1.3rem; border-top: 3px solid; vertical-align: middle;
       margin-right: .3rem }}
@media (max-width: 44rem) {{
  body {{ padding: 1.25rem 1rem 3rem }}
  thead {{ display: none }} table, tbody, tr, th, td {{ display: block }}
  tr {{ padding: .5rem 0; border-bottom: 1px solid var(--line) }}
  th, td {{ border: 0; padding: .12rem 0 }} tbody th small {{ max-width: none }}
  td {{ display: flex; justify-content: space-between; gap: 1rem; text-align: right }}
  td:empty {{ display: none }}
  td::before {{ content: attr(data-column); color: var(--soft); text-align: left }}
}}
</style></head><body>
<h1>{system}: {organ}</h1>
<p class="soft">{about}</p>
{warnings}
<div class="tiles">{tiles}</div>
<p class="soft">Means under <b>{protocol}</b>.</p>

<h2>Per volume, on the scan's own grid</h2>
{volumes}
<p>Mean ± standard deviation over scans; in brackets the 95% bootstrap interval of the mean over
patients, which says how it would vary over other such patients, not over trainings. NSD: share of
both surfaces within {tolerance} mm of the other. Vol. error: |predicted − true| / true.</p>
<p>A scan where truth and prediction are both empty is not scored; one where either is empty counts
as a failure, with Dice and NSD 0 and the image's diagonal as a distance, and stays in the means;
where the truth is empty there is no volume error. No number in mm or mL is given for scans whose
file has lost its spacing, none in mm where a scan's axes are not at right angles (gantry tilt);
"of n" says how many scans have a number. Gate by the classifier: {gate}. Components of a scan's
mask that are kept: {component}.</p>
{strips}

<h2>To compare with the paper: slices with the organ, 256×256 pixels</h2>
{slices}
<p>Each scan's mean over its slices that show the organ, within the slices that are kept for
training: Dice, and the maximum symmetric Hausdorff distance in pixels. The paper does not say where
its boxes come from at evaluation; related code of its authors takes them from the true masks, as
<b>gt_box</b> does.</p>

<h2>Classifier and prompt</h2>
{guidance}
<p>Pooled over the slices of all scans; a slice shows the organ where the mask has a pixel of it on
the scan's own grid.{prompt_note} False positives lie on slices that do not show the organ.</p>

<h2>Cases</h2>
<p>Under the protocol <b>{protocol}</b>, the slice that shows most of the organ. Above: <span
class="key" style="color:{truth}"></span>truth, <span class="key" style="color:{prediction}"></span>
prediction.{cam_note} A picture of every scan lies beside this page.</p>
<div class="figures">{cases}</div>
<details><summary>Every scan</summary>{every_case}</details>

<h2>Learning curves</h2>
<div class="figures">{curves}</div>

<h2>Where this comes from</h2>
<details><summary>Data, labels and checkpoint</summary>{provenance}</details>
<details><summary>Config, every field</summary><pre>{config}</pre></details>
</body></html>
"""
