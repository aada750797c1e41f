(() => {
  const table = document.getElementById("scans"), body = table.tBodies[0], rows = [...body.rows];
  const filter = document.getElementById("filter"), only = document.getElementById("only"), count = document.getElementById("count");
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = (row.textContent + " " + row.cells[1].title + " " + row.cells[3].title).toLowerCase();
      row.hidden = (only.checked && !row.classList.contains("flag")) || !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  };
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : parseFloat(cell.dataset.value);
  };
  const order = (one, other, sign) => {
    if (typeof one !== "number") return sign * one.localeCompare(other, "en", {numeric: true});
    if (isNaN(one) || isNaN(other)) return isNaN(one) - isNaN(other); // what has no number comes last, either way
    return sign * (one - other);
  };
  for (const head of table.tHead.rows[0].cells) {
    const button = head.querySelector("button");
    if (!button) continue;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((one, other) => order(key(one, head.cellIndex), key(other, head.cellIndex), up ? 1 : -1));
      body.append(...rows);
    });
  }
  for (const thumb of document.querySelectorAll("img[data-of]")) // each picture is in the file once
    thumb.src = document.getElementById(thumb.dataset.of).querySelector("img").src;
  filter.addEventListener("input", show);
  only.addEventListener("change", show);
  show();
})();
