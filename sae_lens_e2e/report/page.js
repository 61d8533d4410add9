"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const figures = [...document.querySelectorAll("script.figure")].map((element) => ({
    plot: document.getElementById(element.dataset.plot),
    figure: JSON.parse(element.textContent),
  }));

  // Panels side by side, or one below the other where there is no room.
  const stacked = (layout) => {
    const axes = Object.keys(layout).filter((key) => /^yaxis\d*$/.test(key));
    if (!narrow.matches || axes.length < 2) return layout;
    const panel = 300, gap = 105, below = layout.height - (layout.margin.t ?? 50) - panel;
    const plots = axes.length * panel + (axes.length - 1) * gap;
    const result = { ...layout, margin: { ...layout.margin, l: 60, r: 10 } };
    axes.forEach((key, i) => {
      const top = 1 - (i * (panel + gap)) / plots;
      const named = layout[key].ticktext?.some(Boolean) ? layout[key].ticktext : layout[axes[0]].ticktext;
      result[key] = { ...layout[key], ticktext: named, domain: [Math.max(0, top - panel / plots), top] };
      const x = key.replace("y", "x");
      result[x] = { ...layout[x], domain: [0, 1] };
    });
    // Titles stand above their panels, in the order of these.
    let titles = 0;
    result.annotations = (layout.annotations ?? []).map((one) => {
      if (one.yref !== "paper" || one.showarrow) return one;
      return { ...one, x: 0.5, y: 1 - (titles++ * (panel + gap)) / plots };
    });
    if (titles !== 0 && titles !== axes.length) result.annotations = [];
    result.legend = { ...layout.legend, y: -75 / plots };
    result.height = plots + Math.max(below, 150) + 50;
    return result;
  };

  const dressed = (layout) => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const result = { ...stacked(layout), paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true };
    delete result.width;
    result.font = { ...layout.font, color: colour("--text"), family: getComputedStyle(document.body).fontFamily };
    result.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--text") };
    result.hoverlabel = { ...layout.hoverlabel, bgcolor: colour("--panel"), font: { color: colour("--text") } };
    for (const key of Object.keys(result).filter((name) => /^[xy]axis\d*$/.test(name))) {
      result[key] = { ...result[key], gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
      // Where ticks have names, 0 is a place like any other.
      if (result[key].ticktext) result[key].zeroline = false;
    }
    return result;
  };

  // Black on a dark page would not be seen.
  const coloured = (data) => {
    const text = getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
    const seen = (part) => (part?.color === "#000000" ? { ...part, color: text } : part);
    return data.map((trace) => ({ ...trace, line: seen(trace.line), marker: seen(trace.marker) }));
  };

  const draw = () => Promise.all(figures.map(async ({ plot, figure }) => {
    const settings = {
      responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
      toImageButtonOptions: { format: "svg", filename: plot.id },
    };
    await Plotly.react(plot, coloured(figure.data), dressed(figure.layout), settings);
    plot.dataset.drawn = "true";
  }));

  if (figures.length) {
    draw();
    for (const media of [dark, narrow, matchMedia("print")]) media.addEventListener("change", draw);
  }

  const textOf = (button) => button.closest(".code").querySelector("pre");
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const pre = textOf(button);
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "Copied";
      } catch {
        // Without a clipboard the text is selected, ready to be copied by hand.
        getSelection().selectAllChildren(pre);
      }
    });
  }
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([textOf(button).textContent], { type: "text/plain" }));
      link.download = button.dataset.save;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
})();
