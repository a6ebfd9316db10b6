// "My budget": interpolates the embedded table of optima.
"use strict";
const law = JSON.parse(document.getElementById("law").textContent), columns = law.columns;
const grid = columns.C.map(Math.log);

function at(name, C) { // straight in log-log, as power laws are
  const y = columns[name].map(Math.log), x = Math.log(C);
  const i = Math.max(1, grid.findIndex(v => v >= x));
  return Math.exp(y[i - 1] + (y[i] - y[i - 1]) * (x - grid[i - 1]) / (grid[i] - grid[i - 1]));
}

const three = v => Number(v.toPrecision(3));
const SIZES = [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]];

function count(v) {
  for (const [suffix, size] of SIZES)
    if (v >= 0.9995 * size) return three(v / size) + suffix;
  return String(three(v));
}

function number(text) { // 1e13, 3\u00d710^13, 7.21M; NaN if it is none
  const [, typed, suffix] = text.trim().match(/^(.*?)\s*([TBMk]?)$/);
  const digits = typed.replace(",", ".").replace(/^10\^/, "1e").replace(/\s*[x\u00d7*]\s*10\^?/, "e");
  return Number(digits) * (Object.fromEntries(SIZES)[suffix] ?? 1);
}

function beyond(C) {
  if (C > 1.01 * law.high) return `${count(C / law.high)} times beyond the largest run`;
  return C < 0.99 * law.low ? "below the smallest run" : "";
}

function part(name, C, show) {
  const ends = name + "_low" in columns
    ? ` <span class="ci">${show(at(name + "_low", C))} \u2013 ${show(at(name + "_high", C))}</span>` : "";
  return `<b>${show(at(name, C))}</b>${ends}`;
}

function answer() {
  const out = document.getElementById("answer");
  const C = number(document.getElementById("budget").value);
  if (!(C > 0)) return out.textContent = "Enter a number of FLOPs, such as 1e18.";
  if (C < columns.C[0] || C > columns.C.at(-1)) return out.textContent = "Too far from these runs to extrapolate.";
  let text = `${part("params", C, count)} parameters on ${part("tokens", C, count)} tokens, `
    + `${part("tokens_per_param", C, v => v.toPrecision(3))} tokens per parameter`;
  if ("loss" in columns) text += `, loss ${part("loss", C, v => v.toFixed(3))}`;
  out.innerHTML = `${text} <span class="beyond">${beyond(C)}</span>`;
}

document.getElementById("budget")?.addEventListener("input", answer); // sliders.js takes its place
if (document.getElementById("budget")) answer();
