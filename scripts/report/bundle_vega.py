"""Writes the JavaScript with which the report draws: Vega, Vega-Lite and Vega-Embed in one file, from vl-convert.

    pip install "vl-convert-python==1.9.0.post1" && python scripts/report/bundle_vega.py

vl-convert carries the released sources of the three and bundles them without a network. It is needed for this script alone
and not by those who use the package; docs/decisions/0024-report.md says why.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "src/pruning_comparison/report/vega/vega.js"


def main() -> None:
    """Bundles, and says which versions these are."""
    import vl_convert

    # A script element ends at its end tag, wherever that stands.
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    versions = (
        f"Vega {vl_convert.get_vega_version()}, Vega-Lite {vl_convert.get_vegalite_versions()[-1]}, "
        f"Vega-Embed {vl_convert.get_vega_embed_version()}"
    )
    TARGET.write_text(f"/* {versions}; BSD-3-Clause, see LICENSE beside this file. */\n{bundle}", "utf-8")
    print(f"{TARGET}: {versions}")


if __name__ == "__main__":
    main()
