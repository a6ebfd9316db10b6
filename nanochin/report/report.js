// "My budget": interpolates the embedded table of optima.
"use strict";
const law = JSON.parse(document.getElementById("law").textContent), columns = law.columns;
const grid = columns.C.map(Math.log);

function at(name, C) { // straight in log-log, as power laws are
  const y = columns[name].map(Math.log), x = Math.log(C);
  const i = Math.max(1, grid.findIndex(v => v >= x));
  return Math.exp(y[i - 1] + (y[i] - y[i - 1]) * (x - grid[i - 1]) / (grid[i] - grid[i - 1]));
}

function count(v) {
  for (const [size, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (v >= 0.9995 * size) return Number((v / size).toPrecision(3)) + suffix;
  return String(Number(v.toPrecision(3)));
}

function part(name, C, show) {
  const ends = name + "_low" in columns
    ? ` <span class="ci">${show(at(name + "_low", C))} \u2013 ${show(at(name + "_high", C))}</span>` : "";
  return `<b>${show(at(name, C))}</b>${ends}`;
}

function answer() {
  const out = document.getElementById("answer");
  const typed = document.getElementById("budget").value.trim().replace(",", ".");
  const C = Number(typed.replace(/^10\^/, "1e").replace(/\s*[x\u00d7*]\s*10\^?/, "e"));
  if (!(C > 0)) return out.textContent = "Enter a number of FLOPs, such as 1e18.";
  if (C < columns.C[0] || C > columns.C.at(-1)) return out.textContent = "Too far from these runs to extrapolate.";
  let text = `${part("params", C, count)} parameters on ${part("tokens", C, count)} tokens, `
    + `${part("tokens_per_param", C, v => v.toPrecision(3))} tokens per parameter`;
  if ("loss" in columns) text += `, loss ${part("loss", C, v => v.toFixed(3))}`;
  if (C > 1.01 * law.high) text += ` <span class="beyond">${count(C / law.high)} times beyond the largest run</span>`;
  if (C < 0.99 * law.low) text += ` <span class="beyond">below the smallest run</span>`;
  out.innerHTML = text;
}

document.getElementById("budget").addEventListener("input", answer);
answer();
