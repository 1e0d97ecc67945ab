"""A devbox's start on its host's own clock."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('devboxes', '0001_initial'),
    ]

    operations = [
        migrations.AddField(
            model_name='devbox',
            name='host_clock_at_start',
            field=models.FloatField(blank=True, help_text="Its host's monotonic clock when it began to run, in seconds.", null=True),
        ),
    ]
