// Draws the charts in the theme's colours, and lets units, plans and points answer to clicks.
"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 760px)");

  // "@name" is a colour of the theme, "@name-soft" the same, nearly transparent
  const colour = (token, style) => {
    const [name, soft] = token.slice(1).split("-");
    const value = style.getPropertyValue("--" + name).trim();
    return soft ? value + "33" : value;
  };

  const dressed = (value, style, key = "") => {
    if (typeof value === "string") return key.endsWith("color") && value[0] === "@" ? colour(value, style) : value;
    if (Array.isArray(value)) return value.map((one) => dressed(one, style, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, one]) => [k, dressed(one, style, k)]));
    return value;
  };

  // on a narrow page each legend entry takes a line, which must not be the chart's
  const height = (chart) => {
    const entries = chart.traces.filter((trace) => trace.showlegend !== false).length;
    return narrow.matches ? Math.max(300, chart.layout.height - 60) + 19 * entries : chart.layout.height;
  };

  const look = (style, layout) => {
    const ink = style.getPropertyValue("--ink").trim();
    const line = style.getPropertyValue("--line").trim();
    const frame = { gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, ticks: "outside", ticklen: 4 };
    const title = (axis) => ({ ...axis.title, standoff: 10, font: { size: narrow.matches ? 11.5 : 13 } });
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 11 : 12.5, color: ink },
      margin: { l: 56, r: 14, t: 10, b: 48 },
      hovermode: "closest",
      hoverlabel: { align: "left", font: { size: 12 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal", font: { size: narrow.matches ? 11 : 12 } },
      xaxis: { ...frame, ...layout.xaxis, title: title(layout.xaxis) },
      yaxis: { ...frame, ...layout.yaxis, title: title(layout.yaxis) },
    };
  };

  const config = {
    displaylogo: false,
    responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  const draw = async () => {
    const style = getComputedStyle(document.body);
    for (const chart of data.charts) {
      const place = document.getElementById(chart.name);
      const layout = { ...look(style, dressed(chart.layout, style)), height: height(chart) };
      Plotly.react(place, dressed(chart.traces, style), layout, config);
      await new Promise((drawn) => setTimeout(drawn)); // what is on top shows before the rest is drawn
    }
  };

  const cells = [...document.querySelectorAll("#grid .cell")];
  const choice = document.getElementById("plan");

  const showPlan = (index) => {
    const plan = data.plans[index];
    if (!plan) return;
    choice.value = String(index);
    cells.forEach((cell, place) => {
      const format = plan.formats[place] || "-";
      cell.classList.remove(...data.formats);
      if (data.formats.includes(format)) cell.classList.add(format);
      cell.querySelector(".f").textContent = format;
    });
  };

  const showUnit = (index) => {
    cells.forEach((cell, place) => cell.classList.toggle("shown", place === index));
    const detail = document.getElementById("detail");
    detail.replaceChildren();
    const name = document.createElement("b");
    name.textContent = data.units[index].name;
    detail.append(name);
    for (const line of data.units[index].lines) {
      const row = document.createElement("div");
      row.textContent = line;
      detail.append(row);
    }
  };

  const showMode = (mode) => {
    document.querySelector("#grid .units").dataset.mode = mode;
    for (const button of document.querySelectorAll("[data-show]"))
      button.setAttribute("aria-pressed", String(button.dataset.show === mode));
    for (const legend of document.querySelectorAll("[data-legend]")) legend.hidden = legend.dataset.legend !== mode;
  };

  await draw();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  cells.forEach((cell, index) => cell.addEventListener("click", () => showUnit(index)));
  for (const button of document.querySelectorAll("[data-show]"))
    button.addEventListener("click", () => showMode(button.dataset.show));
  choice?.addEventListener("change", () => showPlan(Number(choice.value)));
  const front = document.getElementById("front");
  if (front && choice)
    front.on("plotly_click", (event) => {
      const index = event.points[0].customdata;
      if (index === undefined) return;
      showPlan(index);
      document.getElementById("grid").scrollIntoView({ behavior: "smooth", block: "nearest" });
    });
  document.body.dataset.ready = "true"; // for whoever waits until all is drawn
})();
