"""The gateway's database: schema, migrations, and one thread through which an event loop may use it."""
